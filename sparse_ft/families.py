"""What a model is made of, found by its structure: backbone, head, norms, tied output embeddings.

Nothing here imports transformers; its models are recognised by the methods and attributes that they
offer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from sparse_ft_kernels.contract import describe_unusable

__all__ = [
    "backbone",
    "backbone_names",
    "decouple_output_embeddings",
    "freeze_norms",
    "is_norm",
    "named_parameters",
    "unwrapped",
]

_NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)
# RMSNorm, LlamaRMSNorm, LayerNorm2d, MambaRMSNormGated; not NormalHead.
_NORM_NAME = re.compile(r"norm(\dd|gated|fp32)?$", re.IGNORECASE)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, each once: a tied one under its name in the backbone, where it is in it.

    So an embedding has one name whatever head is on the model and whether or not the head is tied
    to it. `model.named_parameters()` goes by the order of the modules instead, and the head of
    XLM-R comes first in transformers 5.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    place, inner = _backbone(model)
    inside = {id(p): name for name, p in inner.named_parameters(prefix=place)}
    return {inside.get(id(p), name): p for name, p in model.named_parameters()}


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """The further names of tied parameters, by the name that `named_parameters` gives them."""
    first = {id(p): name for name, p in named_parameters(model).items()}
    further: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (own := first[id(parameter)]) != name:
            further.setdefault(own, []).append(name)
    return further


def known_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name that a file may have for them: all of their own; and as
    transformers loads a bare model from a file of one with a head and the other way round, those
    with the backbone's prefix put before or taken off, where no parameter has that name. The
    prefixes are those of the model's class and of the classes that it comes from: Llama's is
    "model", but "transformer" in the class for question answering."""
    own = dict(model.named_parameters(remove_duplicate=False))
    bare = dict(unwrapped(backbone(model)).named_parameters(remove_duplicate=False))
    whole = unwrapped(model)
    prefixes = {getattr(c, "base_model_prefix", None) for c in (whole, *type(whole).__mro__)}
    names = sorted(p for p in prefixes if isinstance(p, str) and p)
    if not names:
        return own
    others = {f"{prefix}.{name}": p for prefix in names for name, p in bare.items()}
    return {**others, **bare, **own}


def check_usable(what: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Refuse tensors that the kernels cannot work on, by name.

    Raises:
        ValueError: It names the parameter, what it is, and what would work.
    """
    for name, tensor in tensors:
        if reason := unusable(tensor):
            raise ValueError(f"{what}: parameter {name!r} {reason}")


def unusable(tensor: object) -> str | None:
    """Why the kernels cannot work on a parameter, with what would help; None where they can."""
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return "has no shape yet; run the model once first"
    return describe_unusable(tensor)


def backbone(model: nn.Module) -> nn.Module:
    """The pretrained part of a model: a Hugging Face model's base model, else all of it."""
    return _backbone(model)[1]


def _backbone(model: nn.Module) -> tuple[str, nn.Module]:
    """Where the backbone is in a model ("" for all of it), and the backbone."""
    whole = unwrapped(model)
    prefix = getattr(whole, "base_model_prefix", "")
    inner = getattr(whole, prefix, None) if isinstance(prefix, str) and prefix else None
    places = (place for place, module in model.named_modules() if module is inner)
    place = next(places, "")
    return (place, inner) if place and isinstance(inner, nn.Module) else ("", model)


def backbone_names(model: nn.Module) -> set[str]:
    """Names of the parameters that belong to the backbone, as `named_parameters` gives them.

    Membership goes by the parameter itself, not by a prefix of its name: an output matrix belongs
    to it where it is tied to the input embeddings.
    """
    inner = backbone(model)
    inside = {id(parameter) for parameter in inner.parameters()}
    if inner is model and (heads := _heads_beside(unwrapped(model))):
        inside &= {
            id(parameter)
            for module in model.modules()
            if module not in heads
            for parameter in module.parameters(recurse=False)
        }
    return {name for name, parameter in named_parameters(model).items() if id(parameter) in inside}


def _heads_beside(model: nn.Module) -> set[nn.Module]:
    """The modules of the heads of a model that has no module for its backbone. T5 keeps its output
    matrix beside the encoder and the decoder, and its head for question answering too: what comes
    after the last part that is a pretrained model itself."""
    find_out = getattr(model, "get_output_embeddings", None)
    heads: list[Any] = [find_out() if callable(find_out) else None]
    # transformers calls a class with a head so; a bare model such as CLIP's ends in projections.
    if getattr(model, "base_model_prefix", "") and "For" in type(model).__name__:
        children = [*model.children()]
        parts = [i for i, child in enumerate(children) if hasattr(child, "base_model_prefix")]
        if parts:
            heads += children[parts[-1] + 1 :]
    return {m for head in heads if isinstance(head, nn.Module) for m in head.modules()}


def is_norm(module: nn.Module) -> bool:
    """Is this a normalisation layer, by torch's own types or by the name of its class?"""
    return isinstance(module, _NORM_TYPES) or bool(_NORM_NAME.search(type(module).__name__))


def freeze_norms(model: nn.Module, *, by_name: bool = False) -> list[str]:
    """Freezes the parameters of every normalisation layer, as LT-SFT does in both phases.

    Args:
        model: Any module.
        by_name: Freeze the parameters whose name contains "LayerNorm" instead. The LT-SFT reference
            implementation does that, and so misses norms of other names, such as the one in XLM-R's
            language-model head.

    Returns:
        The names of the parameters that are frozen now and were not before.
    """
    parameters = named_parameters(model)
    if by_name:
        chosen = {id(p) for name, p in model.named_parameters() if "LayerNorm" in name}
    else:
        chosen = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    frozen = []
    for name, parameter in parameters.items():
        if id(parameter) in chosen and parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def decouple_output_embeddings(model: nn.Module, *, freeze: bool = True) -> list[str]:
    """Gives the output embeddings a matrix of their own, with the same values, and freezes it.

    LT-SFT does so while it learns a language (paper §4.2): the input embeddings stay trainable and
    the output matrix does not move. A bias of the output layer stays as it is, and so do all other
    ties. The two matrices stay apart through `tie_weights()`, saving and loading; the loaded model
    is trainable throughout, so call this again on it.

    Args:
        model: A model with `get_output_embeddings()` and `get_input_embeddings()`, as Hugging Face
            models have.
        freeze: Freeze the output matrix. False leaves it trainable.

    Returns:
        The names of the output matrices that were decoupled or frozen; empty if the model has none.

    Raises:
        TypeError: The model does not say where its embeddings are.
    """
    find_out = getattr(model, "get_output_embeddings", None)
    find_in = getattr(model, "get_input_embeddings", None)
    if not callable(find_out) or not callable(find_in):
        raise TypeError(
            f"decouple_output_embeddings: {type(model).__name__} has no get_output_embeddings() "
            "and get_input_embeddings(); replace its output matrix by a frozen copy yourself"
        )
    output, embedding = find_out(), find_in()
    if output is None:
        return []
    weight = output.weight
    if embedding is not None and weight is embedding.weight:
        output.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if freeze:
        output.weight.requires_grad_(False)
    _forget_tie(model, output.weight)
    return [
        name for name, p in model.named_parameters(remove_duplicate=False) if p is output.weight
    ]


def _forget_tie(model: Any, weight: nn.Parameter) -> None:
    """Keeps `tie_weights()` from tying an output matrix again, and all other ties as they are."""
    tables: list[Any] = [
        m
        for m in model.modules()
        if isinstance(getattr(m, "_tied_weights_keys", None), dict)
        and hasattr(m, "get_expanded_tied_weights_keys")
    ]
    for module in tables:
        # transformers ≥ 5 ties by a table of names. The configuration stays on: off, the next
        # loading would lose the other ties, those of the output bias and of a decoder's input.
        own = {n for n, p in module.named_parameters(remove_duplicate=False) if p is weight}
        expanded = module.get_expanded_tied_weights_keys(all_submodels=False)
        module._tied_weights_keys = _without(own, expanded)
        if isinstance(getattr(module, "all_tied_weights_keys", None), dict):
            module.all_tied_weights_keys = _without(own, module.all_tied_weights_keys)
    if tables:
        return
    config: Any = getattr(model, "config", None)
    switches = ("is_encoder_decoder", "tie_word_embeddings")
    if all(getattr(config, s, False) for s in switches) and hasattr(model, "_tie_or_clone_weights"):
        # In transformers 4 the second ties encoder and decoder too, and scales T5's output.
        model._tie_or_clone_weights = MethodType(_tie_all_but_the_output, model)
        warnings.warn(
            "decouple_output_embeddings: with this version of transformers, a saved "
            f"{type(model).__name__} has its output matrix tied again when it is loaded; save the "
            "SFT rather than the model, or use transformers 5",
            stacklevel=3,
        )
        return
    get_text = getattr(config, "get_text_config", None)
    parts: list[Any] = [config, get_text() if callable(get_text) else None]
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _tie_all_but_the_output(model: Any, output: nn.Module, embedding: nn.Module) -> None:
    if output is not model.get_output_embeddings():
        type(model)._tie_or_clone_weights(model, output, embedding)


def _without(names: set[str], table: dict[str, str]) -> dict[str, str]:
    return {a: b for a, b in table.items() if a not in names and b not in names}
