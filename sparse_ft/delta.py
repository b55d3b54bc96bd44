"""SparseDelta: a sparse fine-tuning (SFT) as a value — selected entries, what is added to them, and
heads tuned whole."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_ft_kernels import digest as digest_op
from sparse_ft_kernels.contract import describe_unusable

from .families import known_names, named_parameters, unusable
from .metadata import SFTError, checked_meta
from .tiles import TILE, Layout, Support

__all__ = ["Binding", "SFTError", "SparseDelta"]

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOSS_NAMES = {torch.float32: "none", torch.bfloat16: "bf16", torch.float16: "f16"}
# Elements of a tensor that `between` compares at a time: bounds its temporaries.
_CHUNK = 64 * TILE

# A delta's names of tensors → a model's names of them.
KeyMap = Mapping[str, str] | Callable[[str], str]


class SparseDelta:
    """A sparse fine-tuning φ: values at the selected entries of a model, and tensors that were
    tuned whole.

    `iter(delta)` yields (name, flat int64 positions, values), tensor by tensor; `==` compares
    content to the last bit.

    Args:
        support: The selected entries.
        val: fp32, bf16 or fp16 [nnz], one finite value per entry, in the order of the support, on
            its device.
        heads: Name → floating tensor that was tuned densely (a classifier, say): absolute values,
            not differences.
        meta: Fields of the file's metadata: kind, base, trained_on, role, lang, task, license,
            recipe, value_loss, and per tensor aliases, dtypes, dense_roles.

    Raises:
        SFTError: The parts do not fit together; the message names the tensor or field.
    """

    def __init__(
        self,
        support: Support,
        val: Tensor,
        heads: Mapping[str, Tensor] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        check: bool = True,
    ) -> None:
        self.support = support
        self.val = val.detach()
        self.heads = {name: heads[name].detach() for name in sorted(heads)} if heads else {}
        self.meta: dict[str, Any] = dict(meta or {})
        self._content: tuple[str, str] | None = None
        if check:
            self._check()

    def _check(self) -> None:
        support, val = self.support, self.val
        if val.dtype not in VALUE_DTYPES or val.dim() != 1 or not val.is_contiguous():
            raise SFTError(
                "SparseDelta: val must be a contiguous vector of float32, bfloat16 or float16, got "
                f"{val.dtype} of shape {tuple(val.shape)}"
            )
        if len(val) != support.nnz:
            raise SFTError(
                f"SparseDelta: {len(val):,} values for {support.nnz:,} selected entries; "
                "one per entry"
            )
        if val.device != support.device:
            raise SFTError(
                f"SparseDelta: val is on {val.device} and the support on {support.device}; "
                "move one of them"
            )
        _check_finite("SparseDelta", support, val)
        for name, head in self.heads.items():
            check_head(name, head)
        try:
            self.meta = checked_meta(self.meta, support.layout, self.heads)
        except SFTError as error:
            raise SFTError(f"SparseDelta: {error}") from None

    # --- making ---------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def between(
        cls,
        base: nn.Module | Mapping[str, Tensor],
        tuned: nn.Module | Mapping[str, Tensor],
        /,
        support: Support | None = None,
        eps: float = 0.0,
        heads: Mapping[str, Tensor] | Iterable[str] = (),
        **meta: Any,
    ) -> SparseDelta:
        """φ = fp32(tuned) − fp32(base) at the selected entries.

        Args:
            base: The model before, or its tensors by name (fp32, bf16 or fp16).
            tuned: The model after, or its tensors by name.
            support: The entries to take. Default: every entry that differs.
            eps: Entries with |φ| ≤ eps are dropped, if eps > 0 (the LT-SFT reference implementation
                uses 1e-7).
            heads: Tensors to store whole, or their names in `tuned`. They are left out of the
                comparison.
            **meta: Fields of the metadata, such as role, lang, task, license, recipe; or
                base={"id": …, "revision": …}, to name the base model.

        Returns:
            A `SparseDelta` on the CPU with fp32 values. It carries a digest of the base values at
            its entries, by which `bind` recognises the base model, unless `trained_on` says that
            other SFTs were on the base.

        Raises:
            SFTError: A tensor is missing, has another shape, cannot be compared, or differs by NaN
                or infinity.
        """
        before, _ = _tensors("base", base)
        after, aliases = _tensors("tuned", tuned)
        if isinstance(heads, Mapping):
            whole = dict(heads)
        else:
            names = [heads] if isinstance(heads, str) else list(heads)
            for name in names:
                if name not in after:
                    raise SFTError(f"SparseDelta.between: heads: tuned has no tensor {name!r}")
            whole = {name: after[name] for name in names}
        if support is None:
            names_compared = _comparable(before, after, aliases, whole)
        else:
            names_compared = list(support.layout.names)
        for name in names_compared:
            _check_pair(name, before, after, support)
        pieces: list[Tensor] = []
        base_pieces: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        scratch = _Scratch()
        for name in sorted(names_compared):
            old, new = before[name].detach().reshape(-1), after[name].detach().reshape(-1)
            if support is None:
                positions, values, base_pieces[name] = _differing(name, old, new, eps, scratch)
                found[name] = positions
            else:
                positions = support.indices(name)
                taken = old[positions.to(old.device)].cpu()
                values = new[positions.to(new.device)].cpu().float() - taken.float()
                base_pieces[name] = taken
            pieces.append(values)
        if support is None:
            layout = Layout.of({name: after[name] for name in names_compared})
            support = Support.from_indices(layout, found)
        if tied := _aliases_within(support.layout, aliases):
            meta.setdefault("aliases", tied)
        return cls.from_compact(
            support.to("cpu"),
            torch.cat([torch.zeros(0), *pieces]),
            heads={name: tensor.detach().cpu().clone() for name, tensor in whole.items()},
            base=base_pieces,
            base_dtypes={name: before[name].dtype for name in support.layout.names},
            meta=meta,
            eps=eps,
        )

    @classmethod
    @torch.no_grad()
    def from_compact(
        cls,
        support: Support,
        val: Tensor,
        *,
        heads: Mapping[str, Tensor] | None = None,
        base: Mapping[str, Tensor] | None = None,
        base_dtypes: Mapping[str, torch.dtype] | None = None,
        meta: Mapping[str, Any] | None = None,
        eps: float = 0.0,
    ) -> SparseDelta:
        """A delta from values that are gathered already, with the digest of the base they were
        measured from.

        Args:
            support: The selected entries.
            val: [nnz], in the order of the support.
            heads: Tensors tuned whole.
            base: Tensor name → the base values at its selected entries; with it the digests are
                recorded, unless meta["trained_on"] says that other SFTs were on the base then.
            base_dtypes: Tensor name → data type of the base.
            meta: Fields of the metadata.
            eps: Entries with |φ| ≤ eps are dropped, if eps > 0.

        Raises:
            SFTError: The parts do not fit together.
        """
        if not (math.isfinite(eps) and eps >= 0):
            raise SFTError(f"SparseDelta: eps must be a finite number ≥ 0, got {eps}")
        fields = dict(meta or {})
        if base_dtypes:
            fields["dtypes"] = {n: DTYPE_NAMES[base_dtypes[n]] for n in sorted(base_dtypes)}
        pieces: dict[str, Tensor] = {}
        if base is not None:
            for name, count in support.counts().items():
                if count and (name not in base or len(base[name]) != count):
                    got = f"{len(base[name]):,}" if name in base else "no"
                    raise SFTError(
                        f"SparseDelta: {got} base values of {name!r} for its {count:,} "
                        "selected entries"
                    )
                if count:
                    pieces[name] = base[name]
        if eps > 0 and len(val) == support.nnz:
            keep = val.abs() > eps
            pieces = {n: p[keep[support.entries_of(n)].to(p.device)] for n, p in pieces.items()}
            kept = torch.zeros(support.nnz + 1, dtype=torch.int64, device=val.device)
            torch.cumsum(keep, 0, out=kept[1:])
            idx = support.idx.view(torch.int16)[keep].view(torch.uint16)
            support = Support(support.layout, idx, kept[support.ptr], check=False)
            val = val[keep]
        if base is not None and not fields.get("trained_on"):
            fields["base"] = {**fields.get("base", {}), **_digests(support, pieces)}
        return cls(support, val, heads, fields)

    # --- what is in it --------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The tensors that the entries belong to."""
        return self.support.layout

    @property
    def nnz(self) -> int:
        """Selected entries."""
        return self.support.nnz

    @property
    def density(self) -> float:
        """Selected entries over all entries of the layout."""
        return self.support.density

    @property
    def device(self) -> torch.device:
        return self.val.device

    @property
    def kind(self) -> str:
        """`diff`: values are added; `replace`: values are absolute."""
        return str(self.meta.get("kind", "diff"))

    @property
    def content_id(self) -> str:
        """BLAKE2b-256 of the content as 64 hex digits: names a delta, orders deltas, keys caches.

        It covers entries, values, heads, base and `trained_on`, but no free text (role, lang, task,
        license) and no recipe. It is computed once; writing into the tensors of a delta in place
        makes it stale.
        """
        from .files import canonical, content_document, content_hash

        text = canonical(content_document(self))
        if self._content is None or self._content[0] != text:
            self._content = (text, content_hash(text, self))
        return self._content[1]

    def indices(self, name: str) -> Tensor:
        """Flat row-major positions of one tensor's entries (int64, ascending)."""
        return self.support.indices(name)

    def values(self, name: str) -> Tensor:
        """Values of one tensor's entries, a view."""
        return self.val[self.support.entries_of(name)]

    def dense(self, name: str) -> Tensor:
        """One tensor's difference, dense: its shape, the data type of the values, zero where
        nothing is selected."""
        i = self.layout.ordinal(name)
        flat = torch.zeros(self.layout.numels[i], dtype=self.val.dtype, device=self.device)
        flat[self.indices(name)] = self.values(name)
        return flat.reshape(self.layout.shapes[i])

    def __len__(self) -> int:
        return self.nnz

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Tensor by tensor: name, flat positions, values. Tensors without entries are left out."""
        for name, positions in self.support:
            yield name, positions, self.values(name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseDelta):
            return NotImplemented
        from .files import content_document

        return (
            content_document(self) == content_document(other)
            and self.support == other.support
            and _same_bits(self.val, other.val)
            and all(_same_bits(head, other.heads[name]) for name, head in self.heads.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        about = [str(self.meta[key]) for key in ("role", "lang", "task") if self.meta.get(key)]
        heads = f", {len(self.heads)} heads" if self.heads else ""
        return (
            f"SparseDelta({' '.join([*about, ''])}{self.nnz:,} of {self.layout.numel:,} entries, "
            f"{self.density:.3%}, {len(self.layout)} tensors{heads}, "
            f"{str(self.val.dtype).removeprefix('torch.')}, {self.device})"
        )

    # --- the same, otherwise --------------------------------------------------------------------

    def to(self, device: torch.device | str) -> SparseDelta:
        """The same delta on another device, heads included."""
        moved = SparseDelta(
            self.support.to(device),
            self.val.to(device),
            {name: head.to(device) for name, head in self.heads.items()},
            self.meta,
            check=False,
        )
        moved._content = self._content
        return moved

    def astype(self, dtype: torch.dtype) -> SparseDelta:
        """The delta with its values rounded to fp32, bf16 or fp16; `value_loss` records a rounding
        that lost something.

        Raises:
            SFTError: A value is too large for the data type.
        """
        if dtype not in VALUE_DTYPES:
            raise SFTError(
                f"SparseDelta.astype: values are float32, bfloat16 or float16, not {dtype}"
            )
        val = self.val.to(dtype)
        _check_finite(f"SparseDelta.astype({dtype})", self.support, val)
        meta = dict(self.meta)
        if not torch.equal(val.to(torch.float32), self.val.to(torch.float32)):
            meta["value_loss"] = _LOSS_NAMES[dtype]
        return SparseDelta(self.support, val, self.heads, meta, check=False)

    def __neg__(self) -> SparseDelta:
        """−φ, exactly; without heads, which are no differences."""
        if self.kind != "diff":
            raise SFTError(f"SparseDelta: a delta of kind {self.kind!r} has no negative")
        meta = {k: v for k, v in self.meta.items() if k not in ("recipe", "dense_roles")}
        meta["recipe"] = {
            "method": "negation",
            "merged_from": [{"id": self.content_id, "alpha": -1.0}],
        }
        return SparseDelta(self.support, -self.val, None, meta, check=False)

    # --- files ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> str:
        """Writes the delta to a `.safetensors` file, or into an existing folder as
        `sft.safetensors`, atomically.

        Returns:
            The path of the file.

        Raises:
            SFTError: The delta is malformed, or the path is of another kind.
            OSError: The file cannot be written. What stood there before still stands.
        """
        from .files import save

        return save(self, path)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        mmap: bool = False,
    ) -> SparseDelta:
        """Reads a delta from a file, a folder or the Hugging Face Hub; everything in it is checked.

        Args:
            source: A `.safetensors` file; a `pytorch_diff.bin` of the LT-SFT reference
                implementation; a folder with a file `sft.safetensors`, or else `pytorch_diff.bin`;
                or, where there is no such path, the id of a Hub repository, "owner/name", which is
                fetched into the local cache (needs huggingface_hub).
            revision: Branch, tag or commit of a Hub repository.
            mmap: Map the file, copy on write, instead of reading it into memory of its own:
                processes that load it share its pages. Only for files that nobody writes to
                afterwards: changes would go unseen, and a file cut short ends the process. `save`
                may replace it, since what is mapped then stays. A `pytorch_diff.bin` must be
                decoded, and is not mapped.

        Raises:
            SFTFileError: The source is missing, foreign, damaged or malformed; the message says
                which field and why.
        """
        from .files import load
        from .hub import located

        return load(located(source, revision), mmap=mmap)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        message: str = "Upload a sparse fine-tuning",
        token: str | bool | None = None,
    ) -> str:
        """Uploads the delta to a repository of the Hugging Face Hub, which is made if it is not
        there; with a model card, unless it has one.

        Args:
            repo_id: "owner/name".
            revision: The branch; default: main.
            private: Whether a new repository is private; default: what your account says.
            message: The commit's message.
            token: As huggingface_hub takes it; default: the one that you logged in with.

        Returns:
            The address of the commit.

        Raises:
            SFTError: The delta is malformed, or huggingface_hub is missing. Nothing was sent.
            OSError: What huggingface_hub raised.
        """
        from .hub import push

        return push(self, repo_id, revision=revision, private=private, message=message, token=token)

    def model_card(self, repo_id: str = "FOLDER-OR-REPOSITORY") -> str:
        """A README for the delta, with the fields that the Hub reads.

        Args:
            repo_id: What its example loads.
        """
        from .hub import model_card

        return model_card(self, repo_id)

    # --- models ---------------------------------------------------------------------------------

    @torch.no_grad()
    def bind(
        self,
        model: nn.Module,
        *,
        key_map: KeyMap | None = None,
        unused: str = "error",
        allow_base_mismatch: bool = False,
    ) -> Binding:
        """Finds this delta's tensors in a model and checks that they fit; the model is only read.

        A name, or one of its aliases, must be exactly one parameter of the model: of the same
        shape, fp32, bf16 or fp16, contiguous, materialised, made outside of torch.inference_mode()
        and sharing no memory with another tensor of the delta. Where the delta knows the digest of
        its base, the model's values must give it: by fp32 bits, or by bf16 bits (a bf16 copy of the
        base, or the other way round). What `torch.compile`, `DataParallel` and
        `DistributedDataParallel` put before names is looked through, and the prefix of the backbone
        ("bert.", say), which a bare model of transformers lacks, is put before or taken off.

        Args:
            model: The base model, with no SFT on it.
            key_map: From the delta's names to the model's: a callable, or a mapping whose keys are
                names, or prefixes that end in "." ("" is one too; the longest that fits counts),
                such as {"bert.": "roberta."}. Names that it lacks stay.
            unused: What to do about names that the model lacks: "error", or "ignore", which leaves
                their entries out, with a warning. The digest covers all entries, so that with some
                left out the base cannot be recognised, and allow_base_mismatch=True is needed too.
            allow_base_mismatch: Leave the digest alone.

        Returns:
            The parameters in the order of the layout; and the heads' parameters, looked up when
            asked for.

        Raises:
            SFTError: It names the parameter, what was found and what would work.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"SparseDelta.bind: model must be a torch.nn.Module, got {type(model).__name__}"
            )
        if unused not in ("error", "ignore"):
            raise ValueError(
                f'SparseDelta.bind: unused must be "error" or "ignore", got {unused!r}'
            )
        parameters = _parameters(model)
        rename = _renaming(key_map)
        aliases = self.meta.get("aliases", {})
        tensors: dict[str, Tensor] = {}
        missing: list[str] = []
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            known_as = [rename(n) for n in (name, *aliases.get(name, ()))]
            if unused == "ignore" and not any(n in parameters for n in known_as):
                missing.append(name)
            else:
                tensors[name] = _find(model, parameters, known_as, shape, "parameter")
        check_apart(list(tensors.items()))
        binding = Binding(self, list(tensors), list(tensors.values()), model, rename)
        if not allow_base_mismatch:
            binding.check_base()
        if missing:
            warnings.warn(
                f"SparseDelta.bind: the {type(model).__name__} lacks {len(missing)} of the SFT's "
                f"{len(self.layout)} tensors ({_listed(missing)}); {binding.left_out:,} of its "
                f"{self.nnz:,} entries are left out",
                stacklevel=3,  # past the decorator
            )
        return binding

    @property
    def known_digests(self) -> dict[str, str]:
        """The digests of its base that the delta carries."""
        base = self.meta.get("base", {})
        return {key: base[key] for key in ("digest_f32", "digest_bf16") if key in base}

    @torch.no_grad()
    def check_base(self, tensors: Sequence[Tensor]) -> None:
        """Recognises the base model by the digest that the delta carries, if it carries one.

        Args:
            tensors: The base model's values: of each tensor of the layout, in its order.

        Raises:
            SFTError: They are those of another model.
        """
        if not self.known_digests or not self.nnz:
            return
        if len({tensor.device for tensor in tensors if tensor.numel()}) == 1:
            device = next(tensor.device for tensor in tensors if tensor.numel())
            support = self.support.to(device)
            dense = [tensor.detach().to(device) for tensor in tensors]
            sums = digest_op(dense, support.idx, support.ptr).tolist()
            found = {
                "digest_f32": f"{sums[0] & _MASK:016x}",
                "digest_bf16": f"{sums[1] & _MASK:016x}",
            }
        else:
            on_cpu = self.support.to("cpu")
            found = _digests(
                on_cpu,
                {
                    name: _gathered(tensor, on_cpu.indices(name).to(tensor.device))
                    for name, tensor in zip(self.layout.names, tensors, strict=True)
                },
            )
        self._compare_digests(found, {tensor.dtype for tensor in tensors if tensor.numel()})

    def _compare_digests(self, found: Mapping[str, str], kinds: set[torch.dtype]) -> None:
        known = self.known_digests
        if any(found[key] == value for key, value in known.items()):
            return
        hint = ""
        if torch.float16 in kinds and "F16" not in self.meta.get("dtypes", {}).values():
            hint = (
                " The model is in float16, whose rounding hides the base model: "
                "load it in float32 or bfloat16 to have it recognised."
            )
        base = self.meta["base"].get("id")
        made_for = f"made for the base model {base!r}" if base else "made for another base model"
        raise SFTError(
            f"SparseDelta.bind: {made_for}: the model's values at the {self.nnz:,} selected "
            f"entries have the digest {found['digest_f32']} (fp32) and {found['digest_bf16']} "
            f"(bf16), not {' or '.join(known.values())}.{hint} Load the model that the SFT was "
            "made from, with nothing trained or composed on it; or pass allow_base_mismatch=True"
        )


@dataclass
class Binding:
    """Where a delta's tensors are in a model.

    Attributes:
        delta: The delta.
        names: The delta's names of the tensors that the model has, in the order of its layout.
        tensors: The model's parameter for each.
    """

    delta: SparseDelta
    names: list[str]
    tensors: list[Tensor]
    model: nn.Module = field(repr=False)
    rename: Callable[[str], str] = field(repr=False)

    @cached_property
    def heads(self) -> list[tuple[str, Tensor]]:
        """Each head's name and the model's parameter of that name.

        Raises:
            SFTError: The model lacks one, or has it in another shape. A delta whose heads are not
                asked for needs none.
        """
        parameters = _parameters(self.model)
        found: list[tuple[str, Tensor]] = [
            (name, _find(self.model, parameters, [self.rename(name)], tuple(head.shape), "head"))
            for name, head in self.delta.heads.items()
        ]
        check_apart([*zip(self.names, self.tensors, strict=True), *found])
        return found

    @property
    def left_out(self) -> int:
        """Entries of the delta that are in none of the tensors."""
        return self.delta.nnz - sum(len(self.delta.values(name)) for name in self.names)

    @torch.no_grad()
    def check_base(self, read: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        """Recognises the base model by the digest that the delta carries, if it carries one.

        Args:
            read: Gives the base values of a parameter at flat positions (int64). Default: what the
                model holds now.

        Raises:
            SFTError: The values are those of another model, or some of them are left out.
        """
        delta = self.delta
        if not delta.known_digests or not delta.nnz:
            return
        if left_out := self.left_out:
            missing = [name for name in delta.layout.names if name not in self.names]
            raise SFTError(
                f"SparseDelta.bind: the {type(self.model).__name__} lacks {_listed(missing)}, "
                f"which hold {left_out:,} of the SFT's {delta.nnz:,} entries; its digest covers "
                "them all, so that the base model cannot be recognised without them. Pass "
                "allow_base_mismatch=True to apply the others all the same"
            )
        if read is None and len(self.names) == len(delta.layout):
            delta.check_base(self.tensors)
            return
        read, on_cpu = read or _gathered, delta.support.to("cpu")
        pieces = {
            name: read(tensor, on_cpu.indices(name).to(tensor.device))
            for name, tensor in zip(self.names, self.tensors, strict=True)
        }
        kinds = {tensor.dtype for tensor in self.tensors if tensor.numel()}
        delta._compare_digests(_digests(on_cpu, pieces), kinds)


# --- models -------------------------------------------------------------------------------------


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by every name they have, without what wrappers put before names."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    prefixes = {
        f"{place}.module." if place else "module."
        for place, module in model.named_modules()
        if isinstance(module, wrappers)
    }
    found = {}
    for name, parameter in known_names(model).items():
        for prefix in sorted(prefixes, key=len, reverse=True):
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        found[name.replace("_orig_mod.", "")] = parameter
    return found


def _renaming(key_map: KeyMap | None) -> Callable[[str], str]:
    if key_map is None:
        return str
    if not isinstance(key_map, Mapping):
        return key_map
    prefixes = sorted((k for k in key_map if not k or k.endswith(".")), key=len, reverse=True)

    def rename(name: str) -> str:
        if name in key_map:
            return key_map[name]
        for prefix in prefixes:
            if name.startswith(prefix):
                return key_map[prefix] + name.removeprefix(prefix)
        return name

    return rename


def _gathered(tensor: Tensor, positions: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[positions]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def _find(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    names: list[str],
    shape: tuple[int, ...],
    what: str,
) -> nn.Parameter:
    """The one parameter that goes by the first of some names, or by its aliases, the others."""
    name, *aliases = names
    known = [n for n in names if n in parameters]
    if not known:
        if name in dict(model.named_buffers()):
            raise SFTError(f"SparseDelta.bind: {name!r} is a buffer of this model, not a parameter")
        near = difflib.get_close_matches(name, parameters, 1, 0.75)
        like = f"; the nearest name is {near[0]!r}" if near else ""
        leave = ', or unused="ignore" to leave it out' if what == "parameter" else ""
        also = f" (nor under {', '.join(map(repr, aliases))})" if aliases else ""
        raise SFTError(
            f"SparseDelta.bind: the {type(model).__name__} has no parameter {name!r}{also}, which "
            f"the SFT has as a {what} of shape {shape}{like}. Load the SFT's own base model, or "
            f"pass a key_map from the SFT's names to the model's{leave}"
        )
    parameter = parameters[known[0]]
    if len({id(parameters[n]) for n in known}) > 1:
        raise SFTError(
            f"SparseDelta.bind: {' and '.join(map(repr, known))} are one tied parameter in the "
            "SFT's base model and separate parameters in this one; tie them first"
        )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise SFTError(
            f"SparseDelta.bind: parameter {known[0]!r} has no shape yet; run the model once first"
        )
    if type(parameter.data) is not Tensor:
        raise SFTError(
            f"SparseDelta.bind: parameter {known[0]!r} is a {type(parameter.data).__name__}; only "
            "plain tensors work: gather what is sharded, dequantise what is quantised"
        )
    if reason := describe_unusable(parameter):
        raise SFTError(f"SparseDelta.bind: parameter {known[0]!r} {reason}")
    if parameter.is_inference():
        raise SFTError(
            f"SparseDelta.bind: parameter {known[0]!r} was made under torch.inference_mode(), and "
            "could not be written back outside of it; load the model under torch.no_grad() instead"
        )
    if tuple(parameter.shape) != shape:
        raise SFTError(
            f"SparseDelta.bind: parameter {known[0]!r} has shape {tuple(parameter.shape)} in the "
            f"model and {shape} in the SFT; load the SFT's own base model"
        )
    return parameter


def overlapping(tensors: list[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """Two names for one piece of memory, if there are any."""
    spans = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name)
        for name, t in tensors
        if unusable(t) is None and t.numel()
    )
    for (device, _, end, name), (device2, start2, _, name2) in pairwise(spans):
        if device == device2 and start2 < end:
            return name, name2
    return None


def check_apart(
    tensors: list[tuple[str, Tensor]], what: str = "SparseDelta.bind", of: str = "SFT"
) -> None:
    """Refuses two names for one piece of memory: it would be written twice."""
    if pair := overlapping(tensors):
        raise SFTError(
            f"{what}: {pair[0]!r} and {pair[1]!r} are one tensor in this model (tied), but two in "
            f"the {of}; untie them in the model, or make the {of} from a model that ties them"
        )


# --- digests ------------------------------------------------------------------------------------

_MASK = (1 << 64) - 1


def _mixed(position: np.ndarray, bits: np.ndarray) -> int:
    z: Any = position * np.uint64(0x9E3779B97F4A7C15) + bits * np.uint64(0xD1342543DE82EF95)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((z ^ (z >> np.uint64(31))).sum(dtype=np.uint64))


def _digests(support: Support, pieces: Mapping[str, Tensor]) -> dict[str, str]:
    """The digests that the op `digest` gives, from values that are gathered already
    (csrc/sparse_ft.h)."""
    full = half = 0
    for name, positions in support:
        first = int(support.layout.tiles_of(name).start) * TILE + 1
        for start in range(0, len(positions), _CHUNK):
            at = positions[start : start + _CHUNK].cpu().numpy().astype(np.uint64) + np.uint64(
                first
            )
            values = pieces[name][start : start + _CHUNK].detach().cpu().float().contiguous()
            bits = values.view(torch.int32).numpy().view(np.uint32).astype(np.uint64)
            rounded = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
            full += _mixed(at, bits)
            half += _mixed(at, rounded.astype(np.uint64))
    return {"digest_f32": f"{full & _MASK:016x}", "digest_bf16": f"{half & _MASK:016x}"}


# --- comparing two models -----------------------------------------------------------------------


def _tensors(
    what: str, side: nn.Module | Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Tensors by every name they have, and the further names of each tensor that has several."""
    if isinstance(side, nn.Module):
        # The names that `named_parameters` gives come first: a tied tensor goes by its own.
        named: dict[str, Tensor] = {
            **named_parameters(side),
            **dict(side.named_parameters(remove_duplicate=False)),
        }
    elif isinstance(side, Mapping):
        named = dict(side)
    else:
        raise TypeError(
            f"SparseDelta.between: {what} must be a module or a mapping from names to tensors, "
            f"got {type(side).__name__}"
        )
    aliases: dict[str, list[str]] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"SparseDelta.between: {what}[{name!r}] must be a tensor, "
                f"got {type(tensor).__name__}"
            )
        key: tuple[Any, ...] = (name,)
        if tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel():
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(key, name)
        if owner != name:
            aliases.setdefault(owner, []).append(name)
    return named, aliases


def _aliases_within(layout: Layout, aliases: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The further names of the tensors of a layout, which may go by any of their names."""
    found = {}
    for owner, further in aliases.items():
        group = [owner, *further]
        inside = [name for name in group if name in layout]
        if len(inside) > 1:
            raise SFTError(
                f"SparseDelta.between: {inside[0]!r} and {inside[1]!r} are one tensor in tuned "
                "(tied), and the support selects entries of both; leave one out of it"
            )
        if inside:
            found[inside[0]] = [name for name in group if name != inside[0]]
    return found


def _comparable(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    aliases: Mapping[str, list[str]],
    heads: Mapping[str, Tensor],
) -> list[str]:
    """Names to compare when every entry that differs is wanted."""
    further = {alias for group in aliases.values() for alias in group}
    for name in before:
        if name not in after and name not in heads:
            raise SFTError(
                f"SparseDelta.between: base has {name!r}, which tuned lacks; leave it out, or "
                "pass a support"
            )
    names = []
    for name, tensor in after.items():
        if name in further or name in heads:
            continue
        if name not in before:
            raise SFTError(
                f"SparseDelta.between: tuned has {name!r}, which base lacks; name it in heads= to "
                "store it whole, or leave it out"
            )
        if (
            not (tensor.is_floating_point() or tensor.is_complex())
            and tensor.layout is torch.strided
        ):
            if not torch.equal(tensor.cpu(), before[name].cpu()):
                raise SFTError(
                    f"SparseDelta.between: {name!r} has dtype {tensor.dtype} and differs; only "
                    "float32, bfloat16 and float16 tensors can differ. Leave it out"
                )
            continue
        names.append(name)
    return names


def _check_pair(
    name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], support: Support | None
) -> None:
    for what, side in (("base", before), ("tuned", after)):
        if name not in side:
            raise SFTError(
                f"SparseDelta.between: {what} has no tensor {name!r}, which the support has"
            )
        tensor = side[name]
        reason = describe_unusable(tensor)
        if reason and not reason.startswith("is not contiguous"):
            raise SFTError(f"SparseDelta.between: {what}: {name!r} {reason}")
    shapes = {"base": tuple(before[name].shape), "tuned": tuple(after[name].shape)}
    if support is not None:
        shapes["support"] = support.layout.shapes[support.layout.ordinal(name)]
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"{shape} in {what}" for what, shape in shapes.items())
        raise SFTError(f"SparseDelta.between: {name!r} has shape {said}")


class _Scratch:
    """Memory for one chunk of a comparison, taken once: pieces that are kept would else settle in
    what each chunk frees, and the process grow with the model."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._buffers:
            difference, size = torch.empty(2, _CHUNK, device=device)
            self._buffers[device] = (
                difference,
                size,
                torch.empty(_CHUNK, dtype=torch.bool, device=device),
            )
        return self._buffers[device]


def _differing(
    name: str, old: Tensor, new: Tensor, eps: float, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    positions, values, base = [], [], []
    for start in range(0, old.numel(), _CHUNK):
        a, b = old[start : start + _CHUNK], new[start : start + _CHUNK]
        d, size, moved = (buffer[: len(a)] for buffer in scratch.on(a.device))
        d.copy_(b).sub_(size.copy_(a))
        torch.abs(d, out=size)
        # The largest of several is NaN where one is.
        if not torch.isfinite(size.amax()):
            at = int((~torch.isfinite(d)).nonzero()[0])
            raise SFTError(
                f"SparseDelta.between: {name!r} differs by {d[at].item()} at flat index "
                f"{start + at}; differences must be finite"
            )
        torch.gt(size, eps, out=moved)
        at_ = moved.nonzero().reshape(-1)
        positions.append((at_ + start).cpu())
        values.append(d[at_].cpu())
        base.append(a[at_].cpu())
    return (
        torch.cat([torch.zeros(0, dtype=torch.int64), *positions]),
        torch.cat([torch.zeros(0), *values]),
        torch.cat([torch.zeros(0, dtype=old.dtype), *base]),
    )


# --- checks -------------------------------------------------------------------------------------


def _check_finite(what: str, support: Support, val: Tensor) -> None:
    finite = torch.isfinite(val)
    if finite.all():
        return
    entry = int((~finite).nonzero()[0])
    i = int(np.searchsorted(support.starts, entry, side="right")) - 1
    name = support.layout.names[i]
    flat = int(support.indices(name)[entry - int(support.starts[i])])
    raise SFTError(
        f"{what}: the value of {name!r} at flat index {flat} is {val[entry].item()}; "
        "values must be finite"
    )


def check_head(name: str, head: Tensor) -> None:
    """Refuses a head that a file cannot hold or a model cannot take.

    Raises:
        SFTError: It names the head.
    """
    if head.dtype not in DTYPE_NAMES or head.layout is not torch.strided:
        raise SFTError(
            f"SparseDelta: head {name!r} must be a dense tensor of float32, bfloat16, float16 or "
            f"float64, got {head.dtype}, {head.layout}"
        )
    if head.device.type == "meta":
        raise SFTError(f"SparseDelta: head {name!r} is on the meta device and holds no data")
    if not torch.isfinite(head).all():
        raise SFTError(f"SparseDelta: head {name!r} holds NaN or infinite values")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    first, second = (t.detach().cpu().contiguous().reshape(-1).view(integer) for t in (a, b))
    return torch.equal(first, second)
