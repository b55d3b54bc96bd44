"""MaskedAdamW: AdamW over the selected entries of a model, with state for those entries alone."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_ft_kernels import gather, masked_adamw_

from .delta import SparseDelta
from .families import aliases, named_parameters, unusable
from .snapshot import starting_values
from .tiles import Layout, Support

__all__ = ["MaskedAdamW"]


@dataclass(eq=False)
class _Unit:
    """The entries that one call of the kernel updates: one group, one device, one data type.

    `entries` is their distance δ from the start, as an fp32 Parameter of the optimizer: its `.grad`
    is the compact gradient, so gradient scalers and clipping see K numbers rather than N.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    support: Support
    head: bool
    entries: nn.Parameter
    theta0: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    lr: Tensor
    gathered: Tensor
    fresh: set[int] = field(default_factory=set)

    @property
    def delta(self) -> Tensor:
        return self.entries.detach()

    @property
    def numels(self) -> list[int]:
        return [p.numel() for p in self.parameters]

    def fingerprint(self) -> str:
        """A digest of which entries the unit holds, to compare states with."""
        digest = hashlib.blake2b(digest_size=16)
        for name, shape in zip(self.support.layout.names, self.support.layout.shapes, strict=True):
            digest.update(f"{name}{shape};".encode())
        digest.update(self.support.idx.cpu().view(torch.int16).numpy().tobytes())
        digest.update(self.support.ptr.cpu().numpy().tobytes())
        return digest.hexdigest()


NamedParameters = Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]] | nn.Module


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW that moves only the selected entries of a model; all others keep their bits.

    The update is that of `torch.optim.AdamW` (decoupled decay, bias correction, ε outside the
    square root), in fp32 whatever the data type of the weights. The state of an entry is its
    distance δ from the start, and two moments: 12 bytes for each selected entry, nothing for the
    rest; θ0 and, with clipping or hooks, the compact gradient lie beside it: 16 to 20 in all. The
    weight is always round(θ0 + δ), so δ is the sparse fine-tuning φ itself, without a subtraction
    at the end.

    A trainable parameter outside the layout of the support is a *head*: all of it is tuned, by the
    same rule. A parameter without a gradient counts as one with gradient 0.

    Args:
        params: `model.named_parameters()`, or a list of groups whose "params" are (name, parameter)
            pairs, or the model.
        support: The entries to tune, as `sparse_ft.select` gives them.
        theta0: The values at the start, by name, or the path of a checkpoint that has them;
            default: the weights now.
        lr: Learning rate, ≥ 0.
        betas: Decay rates of the moments, in [0, 1).
        eps: ε, ≥ 0.
        weight_decay: Decoupled decay of the tuned entries, ≥ 0.
        l1: λ of the L1 term λ/N · Σ|θ − θ0| (LT-SFT §3.2), ≥ 0. Its gradient is added in fp32,
            before clipping.
        l1_numel: N; default: the elements of all parameters given, frozen ones included.
        l1_heads: Whether the L1 term holds the heads too, as in the reference implementation.
        max_grad_norm: Clips the norm of all tuned gradients (selected entries and heads, with the
            L1 term) to this value, inside the step.
        gather: "step" reads the dense gradients when `step()` is called. "hook" gathers the
            selected entries of each gradient as soon as autograd has finished it and frees the
            dense one, so that at most one lives at a time; repeated backward passes accumulate.

    Raises:
        ValueError: The support names a parameter that is missing, frozen, of another shape or
            unusable, or a hyper-parameter is out of range.
    """

    # GradScaler hands its scale over and lets the step divide by it, without a synchronisation.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: NamedParameters,
        support: Support,
        theta0: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
        *,
        lr: float | Tensor = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        l1: float = 0.0,
        l1_numel: int | None = None,
        l1_heads: bool = True,
        max_grad_norm: float | None = None,
        gather: str = "step",
    ) -> None:
        if gather not in ("step", "hook"):
            raise ValueError(f'MaskedAdamW: gather must be "step" or "hook", got {gather!r}')
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"MaskedAdamW: max_grad_norm must be positive, got {max_grad_norm}")
        if l1_numel is not None and not l1_numel > 0:
            raise ValueError(f"MaskedAdamW: l1_numel must be positive, got {l1_numel}")
        self.support = support
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._theta0 = None if theta0 is None else starting_values("MaskedAdamW", theta0)
        self._l1_heads = l1_heads
        self._hooked = gather == "hook"
        self._units: list[tuple[dict[str, Any], _Unit]] = []
        self._hooks: list[RemovableHandle] = []
        # Trainable parameters without a selected entry, whose gradients the hooks only free.
        self._idle: list[nn.Parameter] = []
        # Elements of every parameter given, frozen ones included.
        self._numels: dict[str, int] = {}
        self._l1_numel = l1_numel
        self._aliases: dict[str, list[str]] = {}
        if isinstance(params, nn.Module):
            self._aliases = aliases(params)
            params = named_parameters(params).items()
        groups: list[Any] = list(params)
        if not groups:
            raise ValueError("MaskedAdamW: no parameters given")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "l1": l1,
        }
        super().__init__(groups, defaults)
        missing = [n for n, c in support.counts().items() if c and n not in self._numels]
        if missing:
            raise ValueError(
                f"MaskedAdamW: the support selects entries of {missing[0]!r}, which is not among "
                "the parameters given; where it is tied, give the model itself"
            )
        if not self._units:
            raise ValueError(
                "MaskedAdamW: nothing to tune: no entry is selected and no head is trainable"
            )

    @property
    def l1_numel(self) -> int:
        """N of the L1 term λ/N · Σ|θ − θ0|."""
        return sum(self._numels.values()) if self._l1_numel is None else self._l1_numel

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its "params" are (name, parameter) pairs."""
        group = dict(param_group)
        pairs = list(group["params"])
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError(
                    "MaskedAdamW: parameters must come with their names, as "
                    "model.named_parameters() gives them"
                )
        group["params"] = [(n, p) for n, p in pairs if p.requires_grad]
        settings = {**self.defaults, **group}
        _check_hyperparameters(settings)
        owners = {
            id(p): n
            for g in self.param_groups
            for n, p in zip(g["param_names"], g["params"], strict=True)
        }
        numels: dict[str, int] = {}
        for name, parameter in pairs:
            if name in self._numels or name in numels:
                raise ValueError(f"MaskedAdamW: parameter {name!r} is given twice")
            if (owner := owners.setdefault(id(parameter), name)) != name:
                raise ValueError(
                    f"MaskedAdamW: {name!r} is {owner!r} under another name (tied); "
                    "give it once, as model.named_parameters() does"
                )
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            if (parameter.requires_grad or lazy) and (reason := unusable(parameter)):
                raise ValueError(f"MaskedAdamW: parameter {name!r} {reason}")
            numels[name] = parameter.numel()
            if parameter.requires_grad:
                continue
            if name in self.support.layout and self.support.counts()[name]:
                raise ValueError(
                    f"MaskedAdamW: the support selects entries of {name!r}, which is frozen; "
                    "set requires_grad on it, or select without it"
                )
        trainable = dict(group["params"])
        units = self._make_units(trainable)
        group["params"] = [
            *group["params"],
            *((f"entries.{len(self._units) + i}", unit.entries) for i, unit in enumerate(units)),
        ]
        super().add_param_group(group)
        added = self.param_groups[-1]
        for unit in units:
            self._units.append((added, unit))
            self._register(unit)
        if self._hooked:
            tuned = {name for unit in units for name in unit.names}
            self._idle += [p for n, p in trainable.items() if n not in tuned]
            self._hooks += [_drop_grads(p) for n, p in trainable.items() if n not in tuned]
        self._numels.update(numels)

    def _register(self, unit: _Unit) -> None:
        self.state[unit.entries] = {
            "step": unit.step,
            "delta": unit.delta,
            "exp_avg": unit.exp_avg,
            "exp_avg_sq": unit.exp_avg_sq,
        }
        if self._hooked:
            self._install_hooks(unit)

    def _make_units(self, parameters: dict[str, nn.Parameter]) -> list[_Unit]:
        layout = self.support.layout
        counts = self.support.counts()
        kinds: dict[tuple[bool, torch.device, torch.dtype], list[str]] = {}
        for name in sorted(parameters):
            parameter = parameters[name]
            head = name not in layout
            if not head:
                shape = layout.shapes[layout.ordinal(name)]
                if tuple(parameter.shape) != shape:
                    raise ValueError(
                        f"MaskedAdamW: parameter {name!r} has shape {tuple(parameter.shape)}, "
                        f"the support was made for {shape}"
                    )
                if not counts[name]:
                    continue
            elif not parameter.numel():
                continue
            kinds.setdefault((head, parameter.device, parameter.dtype), []).append(name)
        return [
            self._make_unit(names, [parameters[n] for n in names], head, device, dtype)
            for (head, device, dtype), names in kinds.items()
        ]

    @torch.no_grad()
    def _make_unit(
        self,
        names: list[str],
        parameters: list[nn.Parameter],
        head: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> _Unit:
        layout = Layout.of(dict(zip(names, parameters, strict=True)))
        support = (Support.full(layout) if head else self.support.restrict(names)).to(device)
        now = _read(support, parameters)
        start = [p.detach() for p in parameters]
        if self._theta0 is not None:
            for i, name in enumerate(names):
                if name not in self._theta0:
                    raise ValueError(f"MaskedAdamW: theta0 has no {name!r}")
                value = self._theta0[name]
                if value.shape != parameters[i].shape or value.dtype != dtype:
                    raise ValueError(
                        f"MaskedAdamW: theta0[{name!r}] is {value.dtype} of shape "
                        f"{tuple(value.shape)}, "
                        f"the parameter {dtype} of shape {tuple(parameters[i].shape)}"
                    )
                start[i] = value.detach()
        theta0 = _read(support, start)

        def zeros() -> Tensor:
            return torch.zeros(support.nnz, dtype=torch.float32, device=device)

        return _Unit(
            names=names,
            parameters=parameters,
            support=support,
            head=head,
            entries=nn.Parameter(now.to(torch.float32) - theta0.to(torch.float32)),
            theta0=theta0,
            exp_avg=zeros(),
            exp_avg_sq=zeros(),
            step=torch.zeros((), dtype=torch.float32, device=device),
            lr=torch.zeros((), dtype=torch.float64, device=device),
            gathered=torch.empty(support.nnz if self._hooked else 0, device=device),
        )

    def _install_hooks(self, unit: _Unit) -> None:
        layout, support = unit.support.layout, unit.support
        for i, (name, parameter) in enumerate(zip(unit.names, unit.parameters, strict=True)):
            tiles, entries = layout.tiles_of(name), support.entries_of(name)
            ptr = support.ptr[tiles.start : tiles.stop + 1] - support.ptr[tiles.start]

            def hook(
                parameter: Tensor,
                i: int = i,
                name: str = name,
                ptr: Tensor = ptr,
                entries: slice = entries,
            ) -> None:
                grad = _usable_grad(name, parameter)
                gather(
                    [grad],
                    [parameter.numel()],
                    support.idx[entries],
                    ptr,
                    unit.gathered[entries],
                    accumulate=i in unit.fresh,
                )
                unit.fresh.add(i)
                parameter.grad = None
                unit.entries.grad = unit.gathered

            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def detach_hooks(self) -> None:
        """Removes the gradient hooks (gather="hook"): the model keeps its gradients again."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all selected entries and heads.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        work: list[tuple[dict[str, Any], _Unit, list[Tensor]]] = []
        for group, unit in self._units:
            grads = (
                []
                if self._hooked
                else [_grad_of(n, p) for n, p in zip(unit.names, unit.parameters, strict=True)]
            )
            if unit.fresh if self._hooked else any(g.numel() for g in grads):
                work.append((group, unit, grads))
        if not work:
            return loss

        clip: Tensor | None = None
        compact: dict[int, Tensor] = {}
        if self._hooked or self.max_grad_norm is not None:
            norms = []
            for group, unit, grads in work:
                if unit.gathered.numel() != unit.support.nnz:
                    # Kept: the first write to fresh memory costs more than the gathering.
                    unit.gathered = torch.empty_like(unit.exp_avg)
                out = unit.gathered
                if self._hooked:
                    _fill_missing(unit)
                norm_sq, _ = gather(
                    grads,
                    unit.numels,
                    unit.support.idx,
                    unit.support.ptr,
                    out,
                    grad_scale=_on(scale, out.device),
                    accumulate=self._hooked,
                    delta=unit.delta,
                    l1=self._l1(group, unit),
                )
                compact[id(unit)] = out
                norms.append(norm_sq)
            total = norms[0]
            for norm_sq in norms[1:]:
                total = total + norm_sq.to(total.device)
            self.grad_norm = total.sqrt().reshape(())
            if self.max_grad_norm is not None:
                clip = (
                    (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0).to(torch.float32)
                )

        for group, unit, grads in work:
            device = unit.exp_avg.device
            ready = compact.get(id(unit))
            masked_adamw_(
                unit.parameters,
                unit.support.idx,
                unit.support.ptr,
                grads if ready is None else ready,
                unit.exp_avg,
                unit.exp_avg_sq,
                unit.delta,
                unit.theta0,
                unit.step,
                lr=_refresh(unit.lr, group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                l1=self._l1(group, unit) if ready is None else 0.0,
                grad_scale=_on(scale, device) if ready is None else None,
                found_inf=_on(found_inf, device),
                clip=_on(clip, device),
            )
            if self._hooked:
                # The compact gradient has been scaled and given its L1 term: it is used up.
                unit.fresh.clear()
                unit.entries.grad = None
        return loss

    def _l1(self, group: dict[str, Any], unit: _Unit) -> float:
        if unit.head and not self._l1_heads:
            return 0.0
        return float(group["l1"]) / self.l1_numel

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, dense and gathered."""
        for _, unit in self._units:
            unit.fresh.clear()
            unit.entries.grad = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def delta(self, eps: float = 0.0, **meta: Any) -> SparseDelta:
        """The sparse fine-tuning so far: φ = δ at the selected entries, and the heads.

        Args:
            eps: Entries with |φ| ≤ eps are dropped, if eps > 0 (the LT-SFT reference implementation
                uses 1e-7).
            **meta: Fields of the file's metadata, such as role, lang, task, license.

        Returns:
            A `SparseDelta` over the layout of the support, on the CPU, independent of the
            optimizer.
        """
        val = torch.zeros(self.support.nnz, dtype=torch.float32)
        base: dict[str, Tensor] = {}
        heads: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for _, unit in self._units:
            for name, parameter in zip(unit.names, unit.parameters, strict=True):
                if unit.head:
                    heads[name] = parameter.detach().cpu().clone()
                    continue
                mine = unit.support.entries_of(name)
                val[self.support.entries_of(name)] = unit.delta[mine].cpu()
                base[name] = unit.theta0[mine].cpu()
                dtypes[name] = parameter.dtype
        tied = {n: self._aliases[n] for n in self.support.layout.names if n in self._aliases}
        if tied:
            meta.setdefault("aliases", tied)
        support = self.support.to("cpu")
        return SparseDelta.from_compact(
            support, val, heads=heads, base=base, base_dtypes=dtypes, meta=meta, eps=eps
        )

    @torch.no_grad()
    def start_from(self, values: Tensor) -> None:
        """Sets δ of every selected entry, and the weights with it; the moments stay as they are.

        Args:
            values: fp32 [support.nnz], in the order of the support.

        Raises:
            ValueError: It has another data type or length.
        """
        if values.dtype != torch.float32 or tuple(values.shape) != (self.support.nnz,):
            raise ValueError(
                f"MaskedAdamW.start_from: values must be float32 of shape ({self.support.nnz},), "
                f"got {values.dtype} of shape {tuple(values.shape)}"
            )
        for _, unit in self._units:
            if unit.head:
                continue
            for name in unit.names:
                mine = values[self.support.entries_of(name)]
                unit.delta[unit.support.entries_of(name)] = mine.to(unit.delta.device)
            _write(unit)

    @torch.no_grad()
    def holds(self, model: nn.Module | None = None) -> bool:
        """Whether the weights are where the last step left them: w = round(θ0 + δ) at every tuned
        entry, and (where a model is given) they are still that model's parameters."""
        mine = None if model is None else {id(p) for p in model.parameters()}
        return all(
            (mine is None or mine.issuperset(map(id, unit.parameters)))
            and torch.equal(
                _bits(_read(unit.support, unit.parameters)),
                _bits((unit.theta0.to(torch.float32) + unit.delta).to(unit.theta0.dtype)),
            )
            for _, unit in self._units
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds. Copy the model in the same call: they stay together."""
        own = (
            *("support", "max_grad_norm", "grad_norm", "_theta0", "_l1_heads", "_l1_numel"),
            *("_hooked", "_units", "_idle", "_numels", "_aliases"),
        )
        state: dict[str, Any] = super().__getstate__()
        return {**state, "state": {}, **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": defaultdict(dict), "_hooks": []})
        for _, unit in self._units:
            self._register(unit)
            if unit.fresh:
                unit.entries.grad = unit.gathered
        if self._hooked:
            self._hooks += [_drop_grads(p) for p in self._idle]

    def state_dict(self) -> dict[str, Any]:
        """The state of all selected entries and the groups; its tensors are the optimizer's own."""
        units = []
        for group, unit in self._units:
            units.append(
                {
                    "fingerprint": unit.fingerprint(),
                    "group": next(i for i, g in enumerate(self.param_groups) if g is group),
                    "step": unit.step,
                    "delta": unit.delta,
                    "theta0": unit.theta0,
                    "exp_avg": unit.exp_avg,
                    "exp_avg_sq": unit.exp_avg_sq,
                }
            )
        groups = [
            {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for group in self.param_groups
        ]
        return {
            "format": "sparse_ft.MaskedAdamW",
            "version": 1,
            "state": units,
            "param_groups": groups,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a stored state, and puts the weights where that state has them.

        Raises:
            ValueError: The state belongs to another optimizer, another support or another start.
                Nothing changes then.
        """
        if state_dict.get("format") != "sparse_ft.MaskedAdamW" or state_dict.get("version") != 1:
            raise ValueError(
                "MaskedAdamW.load_state_dict: this is not the state of a MaskedAdamW (version 1)"
            )
        stored, groups = state_dict["state"], state_dict["param_groups"]
        if len(stored) != len(self._units) or len(groups) != len(self.param_groups):
            raise ValueError(
                f"MaskedAdamW.load_state_dict: the state has {len(groups)} groups and "
                f"{len(stored)} units, "
                f"this optimizer {len(self.param_groups)} and {len(self._units)}"
            )
        for saved, (_, unit) in zip(stored, self._units, strict=True):
            where = f"the unit that begins with {unit.names[0]!r}"
            if saved["fingerprint"] != unit.fingerprint():
                raise ValueError(
                    f"MaskedAdamW.load_state_dict: {where} has another support than the state; "
                    "build the optimizer with the support of the run that was saved"
                )
            for key in ("step", "delta", "theta0", "exp_avg", "exp_avg_sq"):
                own, found = getattr(unit, key), saved.get(key)
                if found is None or found.shape != own.shape or found.dtype != own.dtype:
                    raise ValueError(f"MaskedAdamW.load_state_dict: {where}: {key} does not fit")
            if not torch.equal(_bits(saved["theta0"].to(unit.theta0.device)), _bits(unit.theta0)):
                raise ValueError(
                    f"MaskedAdamW.load_state_dict: {where} starts from other values than the "
                    "state; "
                    "pass the theta0 of the run that was saved"
                )
        for group, saved_group in zip(self.param_groups, groups, strict=True):
            group.update(copy.deepcopy(saved_group))
        for saved, (_, unit) in zip(stored, self._units, strict=True):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                getattr(unit, key).copy_(saved[key])
            unit.delta.copy_(saved["delta"])
            _write(unit)


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    limits = (
        ("lr", float(group["lr"]), math.inf),
        ("betas[0]", beta1, 1.0),
        ("betas[1]", beta2, 1.0),
        ("eps", group["eps"], math.inf),
        ("weight_decay", group["weight_decay"], math.inf),
        ("l1", group["l1"], math.inf),
    )
    for name, value, below in limits:
        if not 0.0 <= value < below:
            raise ValueError(f"MaskedAdamW: {name} must be in [0, {below}), got {value}")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _read(support: Support, tensors: Iterable[Tensor]) -> Tensor:
    """The selected entries of tensors that stand in the order of the support's layout, read where
    each tensor is."""
    pieces = [
        tensor.detach().reshape(-1)[support.indices(name).to(tensor.device)].to(support.device)
        for name, tensor in zip(support.layout.names, tensors, strict=True)
    ]
    return torch.cat(pieces)


def _write(unit: _Unit) -> None:
    values = unit.theta0.to(torch.float32) + unit.delta
    for name, parameter in zip(unit.names, unit.parameters, strict=True):
        entries = unit.support.entries_of(name)
        parameter.detach().view(-1)[unit.support.indices(name)] = values[entries].to(
            parameter.dtype
        )


def _drop_grads(parameter: nn.Parameter) -> RemovableHandle:
    """Frees every gradient of a parameter as soon as autograd has finished it."""

    def hook(parameter: Tensor) -> None:
        parameter.grad = None

    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)
    return handle


def _usable_grad(name: str, parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise ValueError(
            f"MaskedAdamW: the gradient of {name!r} is sparse ({grad.layout}); build its layer "
            "with sparse=False"
        )
    return grad.contiguous()


def _grad_of(name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return _usable_grad(name, parameter)


def _fill_missing(unit: _Unit) -> None:
    """Zeroes the compact gradient of parameters that no backward pass has reached."""
    for i, name in enumerate(unit.names):
        if i not in unit.fresh:
            unit.gathered[unit.support.entries_of(name)] = 0


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, torch.float32, non_blocking=True)


def _refresh(target: Tensor, value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        target.copy_(value)
    else:
        target.fill_(value)
    return target
