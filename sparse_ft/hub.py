"""Sparse fine-tunings on the Hugging Face Hub: download, upload, and the model card.

Needs the package huggingface_hub (`pip install "sparse-ft[hub]"`). Its cache, its offline mode and
its tokens are honoured.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .files import FILE_NAME, LEGACY_NAME, SFTFileError
from .metadata import SFTError

if TYPE_CHECKING:
    from .delta import SparseDelta

__all__ = ["download", "located", "model_card", "push"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(source: str | os.PathLike[str], revision: str | None = None) -> str:
    """A source as a path of this machine: a repository of the Hub is fetched into the cache.

    Args:
        source: A path, or, where there is no such path, the id of a repository, "owner/name";
            where there is a folder "owner" here, only with a revision.
        revision: Branch, tag or commit of the repository.

    Returns:
        The path given, or that of the fetched file.

    Raises:
        SFTFileError: The repository cannot be fetched, or holds no SFT.
        SFTError: A revision is given for a path.
    """
    if os.path.lexists(source):
        if revision is not None:
            raise SFTError(
                f"SparseDelta.load: {os.fsdecode(source)!r} is a path on this machine, which has "
                f"no revision {revision!r}; only Hub repositories have revisions"
            )
    elif (
        isinstance(source, str)
        and len(source) <= 96
        and _REPOSITORY.fullmatch(source)
        and not source.endswith((".safetensors", ".bin"))
        # In a folder that is here, a name that is not is a mistake, and nobody else's business.
        and (revision is not None or not os.path.isdir(source.partition("/")[0]))
    ):
        return download(source, revision)
    return os.fsdecode(source)


def download(repo_id: str, revision: str | None = None) -> str:
    """Fetches the SFT of a Hub repository into the local cache, or finds it there.

    Args:
        repo_id: Such as "cambridgeltl/mbert-lang-sft-sw-small".
        revision: A branch, tag or commit; default: the repository's main branch.

    Returns:
        The path of its `sft.safetensors`, or of its `pytorch_diff.bin` where it has no other.

    Raises:
        SFTFileError: There is no such repository, revision or file, or it can be neither reached
            nor found in the cache.
    """
    hub = _hub(f"{repo_id}: no such file or folder; to look on the Hugging Face Hub")
    from huggingface_hub import errors

    where = f"{repo_id}@{revision}" if revision else repo_id
    for name in (FILE_NAME, LEGACY_NAME):
        try:
            with _quiet():
                return str(
                    hub.hf_hub_download(
                        repo_id,
                        name,
                        revision=revision,
                        library_name="sparse_ft",
                        library_version=__version__,
                    )
                )
        except errors.LocalEntryNotFoundError as error:
            # Neither reached nor cached. To ask for the other name would be to wait once more.
            cached = hub.try_to_load_from_cache(repo_id, LEGACY_NAME, revision=revision)
            if isinstance(cached, str):
                return cached
            raise SFTFileError(
                f"{where}: no such file or folder, and neither {FILE_NAME} nor {LEGACY_NAME} of "
                "the Hub repository is in the local cache, while the Hub cannot be reached (or "
                "HF_HUB_OFFLINE is set)"
            ) from error
        except errors.GatedRepoError as error:
            raise SFTFileError(
                f"{where}: access to this Hub repository must be granted first; ask for it on its "
                "page and log in with `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise SFTFileError(
                f"{where}: neither a file or folder here nor a repository on the Hugging Face Hub "
                "that you may see; a private one needs `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise SFTFileError(
                f"{where}: the Hub repository has no revision {revision!r}"
            ) from error
        except errors.EntryNotFoundError:
            continue
        except Exception as error:  # its own, and those of what it sends requests with
            raise SFTFileError(
                f"{where}: cannot be fetched from the Hub: {_said(error)}"
            ) from error
    raise SFTFileError(
        f"{where}: the Hub repository holds neither {FILE_NAME} nor {LEGACY_NAME}, so it is no SFT"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that huggingface_hub logs at each retry: what comes of it is said once."""
    from huggingface_hub.utils import logging as log

    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)


def push(
    delta: SparseDelta,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "Upload a sparse fine-tuning",
    token: str | bool | None = None,
) -> str:
    """What `SparseDelta.push_to_hub` does: one commit with the file and a model card. A card that
    the repository has already is left alone.
    """
    hub = _hub("SparseDelta.push_to_hub")
    api = hub.HfApi(token=token, library_name="sparse_ft", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="sparse-ft-push-") as folder:
        # Written first: what cannot be saved makes no repository.
        path = delta.save(Path(folder) / FILE_NAME)
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [hub.CommitOperationAdd(FILE_NAME, path)]
        if not api.file_exists(repo_id, "README.md", revision=revision):
            card = model_card(delta, repo_id).encode()
            operations.append(hub.CommitOperationAdd("README.md", card))
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


def model_card(delta: SparseDelta, repo_id: str = "FOLDER-OR-REPOSITORY") -> str:
    """A README for an SFT: what it is, what it belongs to, how to use it, how it was made.

    Args:
        delta: The SFT.
        repo_id: What the example loads.

    Returns:
        Markdown behind the YAML fields that the Hub reads.
    """
    meta = delta.meta
    base = meta.get("base", {})
    fields: dict[str, Any] = {
        "library_name": "sparse-ft",
        "tags": ["sparse-fine-tuning", "lt-sft"],
        "language": [meta["lang"]] if meta.get("lang") else None,
        "license": meta.get("license"),
        "base_model": base.get("id"),
        "base_model_relation": "adapter" if base.get("id") else None,
    }
    # JSON is YAML, and quotes what a name may hold.
    front = [f"{key}: {_json(value)}" for key, value in fields.items() if value]
    about = " ".join(meta[key] for key in ("lang", "task", "role") if meta.get(key))
    model = base.get("id") or "the base model"
    heads = ", heads=delta" if delta.heads and delta.kind == "diff" else ""
    use = (
        f"with sf.compose(model, delta{heads}):  # bit-exact on the way out\n    ..."
        if delta.kind == "diff"
        else "delta.kind  # 'replace': absolute values, for sf.exchange.write_patch"
    )
    counts = {name: count for name, count in delta.support.counts().items() if count}
    largest = sorted(counts, key=lambda name: (-counts[name], name))[:5]
    rows = {
        "base model": " ".join(str(base[key]) for key in ("id", "revision", "arch") if key in base),
        "trained with": _listing(meta.get("trained_on", [])),
        "entries": f"{delta.nnz:,} of {delta.layout.numel:,} ({delta.density:.3%})",
        "tensors": f"{len(counts):,} of {len(delta.layout):,} have entries; most: "
        + ", ".join(f"{name} ({counts[name]:,})" for name in largest),
        "heads": ", ".join(
            f"{name} {'×'.join(map(str, head.shape)) or 'scalar'}"
            for name, head in delta.heads.items()
        ),
        "values": str(delta.val.dtype).removeprefix("torch."),
        **{
            f"recipe: {key}": _listing(value)
            for key, value in meta.get("recipe", {}).items()
            # What was not set says nothing.
            if value is not None and (key, value) != ("eps", 0)
        },
        "content id": delta.content_id,
    }
    table = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items() if value]
    return "\n".join(
        [
            *("---", *front, "---", ""),
            f"# Sparse fine-tuning{f' ({_cell(about)})' if about else ''}",
            "",
            f"A sparse difference to {_cell(model)}: {delta.nnz:,} values at selected entries of "
            "its parameters, to be added to them, alone or together with others "
            "([LT-SFT](https://aclanthology.org/2022.acl-long.125/)).",
            "",
            *("```python", "import sparse_ft as sf", ""),
            f"delta = sf.SparseDelta.load({json.dumps(repo_id)})",
            *(use, "```", ""),
            *("| | |", "| --- | --- |", *table, ""),
        ]
    )


def _json(value: Any) -> str:
    # Not ASCII: YAML knows no surrogate pairs.
    return json.dumps(value, ensure_ascii=False)


def _listing(value: Any) -> str:
    """Text as it is, SFTs with their weights as a list, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return ", ".join(f"{item['alpha']:g} × {item['id'][:16]}…" for item in value)
    except (TypeError, KeyError, ValueError):
        return _json(value)


def _cell(text: str) -> str:
    """Foreign text, inert inside a Markdown table."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise SFTFileError(
            f'{what} needs huggingface_hub; install it with: pip install "sparse-ft[hub]"'
        ) from None
    return huggingface_hub


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
