"""Models and tokenizers of the tasks, from a folder or the Hub, by transformers' own classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..families import backbone_names

__all__ = ["load_model", "load_tokenizer"]


def load_model(
    base: str | os.PathLike[str],
    auto: str,
    *,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """A pretrained model under a head, which is new where the base has none.

    Args:
        base: A folder with a model, or its name on the Hub.
        auto: The class of transformers that knows the head, such as
            "AutoModelForTokenClassification".
        labels: What the head tells apart, in order; in `model.config` from then on.
        seed: Of the head's values: the same seed gives the same head, whatever was drawn before.
        **options: Of `from_pretrained`; `dtype` is float32 unless given, as weights in half
            precision do not move (each step rounds away).

    Raises:
        OSError: There is no such model, or it cannot be read or reached.
        ValueError: transformers has no such head for this kind of model, the base has a head of
            another size, or its weights do not fit.
    """
    options = {"dtype": torch.float32, **options}
    if labels is not None:
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, loaded = _class(base, auto).from_pretrained(
                os.fspath(base), output_loading_info=True, **options
            )
    except RuntimeError as error:
        # As transformers 5 and 4 say it.
        if not any(said in str(error) for said in ("ignore_mismatched_sizes", "size mismatch")):
            raise
        raise ValueError(
            f"{base}: some of its weights, such as those of a head, have other shapes than this "
            "task needs; give the labels that its head tells apart, or a base without a head"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"{base}: transformers has no {auto} for this kind of model") from None
        raise _not_found(base, "model", error) from None
    _check_backbone(base, model, loaded["missing_keys"])
    _draw_pooler(model, loaded["missing_keys"])
    found: nn.Module = model
    return found


def _class(base: str | os.PathLike[str], auto: str) -> Any:
    """The class to load a model with.

    Llama's and Qwen's question answering call their backbone otherwise than the other heads do: no
    weight of a base would be found, and no SFT of a language would fit. Such a class is given its
    family's name for it.
    """
    import transformers

    known = getattr(transformers, auto)
    if auto != "AutoModelForQuestionAnswering":
        return known
    config = transformers.AutoConfig.from_pretrained(os.fspath(base))
    kind = known._model_mapping.get(type(config), None)
    if kind is None or "base_model_prefix" not in vars(kind):
        return known
    prefix = super(kind, kind).base_model_prefix
    own = {"base_model_prefix": prefix, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own)


def _check_backbone(base: str | os.PathLike[str], model: nn.Module, missing: Iterable[str]) -> None:
    """Refuses a backbone of which the base has not all weights: the rest would be random. A pooler
    is the exception, as masked language models have none.

    Raises:
        ValueError: It names a weight that is missing.
    """
    wanted = backbone_names(model)
    if absent := sorted(name for name in missing if name in wanted and "pooler" not in name):
        raise ValueError(
            f"{base}: has no weights for {len(absent)} of the {len(wanted)} tensors of the model's "
            f"backbone, such as {absent[0]}; they would be random. Name a base of the same kind"
        )


def _draw_pooler(model: Any, missing: Iterable[str]) -> None:
    """Gives a pooler that the base lacks the same values for every seed, as BERT's are drawn: it is
    of the backbone, and an SFT fits one backbone alone."""
    parameters, wanted = dict(model.named_parameters()), backbone_names(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for name in sorted(wanted.intersection(missing)):
            if parameters[name].dim() > 1:
                parameters[name].normal_(std=getattr(model.config, "initializer_range", 0.02))
            else:
                parameters[name].zero_()


def load_tokenizer(base: str | os.PathLike[str], *, words: bool = False) -> Any:
    """The fast tokenizer of a model; where it has no padding piece, the end of text is one.

    Args:
        base: A folder with a tokenizer, or the model's name on the Hub.
        words: It will be given words, not text; some refuse that unless told.

    Raises:
        OSError: There is no such tokenizer, or it cannot be read or reached.
        ValueError: It is not a fast one, or has neither padding nor end of text.
    """
    import transformers

    load = partial(transformers.AutoTokenizer.from_pretrained, os.fspath(base))
    try:
        with _quiet():
            tokenizer = load()
            # Not for all: told so, that of Llama wants the slow tokenizer's packages.
            if words and tokenizer.is_fast and not _takes_words(tokenizer):
                tokenizer = load(add_prefix_space=True)
    except (OSError, ValueError) as error:
        raise _not_found(base, "tokenizer", error) from None
    if not tokenizer.is_fast:
        raise ValueError(
            f"{base}: the tokenizer is not a fast one, and only those tell which word a piece is "
            "of; a tokenizer.json in the folder makes it one"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{base}: the tokenizer has no padding piece and no end of text")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _takes_words(tokenizer: Any) -> bool:
    try:
        tokenizer(["a"], is_split_into_words=True)
    except AssertionError:
        return False
    return True


def _not_found(base: str | os.PathLike[str], what: str, error: Exception) -> OSError:
    reason = str(error).strip().partition("\n")[0]
    if Path(base).is_dir():
        return OSError(f"{base}: the folder holds no {what} that can be read ({reason})")
    return OSError(
        f"{base}: neither a folder with a {what} nor a model that the Hub or its cache gives "
        f"({reason})"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns that the head is new, which is what was asked for, and shows bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
