"""Language modelling, masked and causal: how a language SFT is learnt from plain text."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..families import backbone, unwrapped
from .base import Batch, Collate, Task, check_length, evaluating, field, padded, register
from .data import DataError, Examples, source_of

__all__ = ["Blocks", "CausalLM", "MaskedLM", "mask_pieces"]

# Lines that the tokenizer gets at once.
_LINES = 1000
# Logits of few positions and of all of them, and losses, differ by rounding: by less than this
# share of the largest.
_ROUNDING, _HALF_ROUNDING = 1e-4, 2e-2


class Blocks(Sequence[dict[str, Any]]):
    """Text as blocks of pieces, 4 bytes a piece.

    Args:
        pieces: int32 [n], the pieces of all lines, one after another.
        length: Pieces of a block; only the last may be shorter.
    """

    def __init__(self, pieces: Tensor, length: int) -> None:
        self.pieces = pieces
        self.length = length

    def __len__(self) -> int:
        return -(-len(self.pieces) // self.length)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        start = i % len(self) * self.length
        return {"input_ids": self.pieces[start : start + self.length].long()}


@dataclass(frozen=True)
class _LanguageModelling(Task):
    """What masked and causal language modelling share: packed blocks and a loss per piece.

    Lines are joined, each with its special pieces, and cut into blocks whatever the lines, as the
    LT-SFT reference does (`line_by_line=False`). Nothing is dropped but a remainder of one piece.

    Attributes:
        metric: "loss" or "perplexity".
        text: The field that holds the text.
    """

    role: ClassVar[str] = "language"

    metric: str = "loss"
    text: str = "text"

    def __post_init__(self) -> None:
        if self.metric not in ("loss", "perplexity"):
            raise ValueError(f'metric is {self.metric!r}; {self.name} has "loss" and "perplexity"')

    def checked(self, examples: Examples) -> Examples:
        for i in range(len(examples)):
            field(examples, i, self.text, str)
        return examples

    def encode(
        self,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        max_length: int,
        *,
        labels: Sequence[str] | None = None,
    ) -> Blocks:
        check_length(tokenizer, max_length, least=2)
        special = tokenizer.num_special_tokens_to_add()
        pieces = array("i")
        texts = iter(example[self.text] for example in examples)
        while lines := list(islice(texts, _LINES)):
            for ids in tokenizer(lines, return_attention_mask=False, verbose=False)["input_ids"]:
                if len(ids) > special:
                    pieces.extend(ids)
                    pieces.extend(self._end(tokenizer, ids))
        if len(pieces) < 2:
            raise DataError(f"{source_of(examples)}: holds no text for this tokenizer")
        if len(pieces) % max_length == 1:
            pieces.pop()
        return Blocks(torch.frombuffer(pieces, dtype=torch.int32).clone(), max_length)

    def _end(self, tokenizer: Any, ids: list[int]) -> list[int]:
        return []

    def evaluate(
        self,
        model: nn.Module,
        features: Sequence[dict[str, Any]],
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        batch_size: int = 32,
    ) -> dict[str, float]:
        total, count = 0.0, 0
        with evaluating(model):
            for batch in self._fixed_batches(features, tokenizer, batch_size):
                n = self._predicted(batch["labels"])
                total += float(self.loss(model, batch)) * n
                count += n
        loss = total / count
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "n": float(count)}

    def _fixed_batches(
        self, features: Sequence[dict[str, Any]], tokenizer: Any, batch_size: int
    ) -> Iterator[Batch]:
        """Batches that are the same at every evaluation."""
        collate = self.collate(tokenizer)
        for start in range(0, len(features), batch_size):
            yield collate(list(features[start : start + batch_size]))

    def _predicted(self, labels: Tensor) -> int:
        """The pieces that a batch's loss is the mean over."""
        return int((labels != -100).sum())


@register
@dataclass(frozen=True)
class MaskedLM(_LanguageModelling):
    """Masked language modelling: 15 % of the pieces, of which 80 % become the mask, 10 % a random
    piece and 10 % stay (Devlin et al., NAACL 2019, §3.1).

    Training draws its masks anew from torch's random state. Evaluation draws the same ones every
    time, so that the losses of checkpoints compare.

    Attributes:
        probability: Share of the pieces to predict.
        mask_seed: Of the masks at evaluation.
    """

    name: ClassVar[str] = "mlm"
    auto: ClassVar[str] = "AutoModelForMaskedLM"

    probability: float = 0.15
    mask_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must lie in (0, 1], got {self.probability}")

    def tokenizer(self, base: Any) -> Any:
        tokenizer = super().tokenizer(base)
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{base}: the tokenizer has no mask; use the task clm")
        return tokenizer

    def collate(self, tokenizer: Any) -> Collate:
        return _Masking(tokenizer, self.probability)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """As of any task. The head, most of a small model's work, sees the positions to predict
        alone, where it treats each for itself."""
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        if not _by_position(model, inputs):
            return super().loss(model, batch)
        labels = batch["labels"].flatten()
        places = (labels != -100).nonzero()[:, 0]
        logits = _logits_at(model, inputs, places.to(device))[0]
        return functional.cross_entropy(logits.float(), labels[places].to(device))

    def _fixed_batches(
        self, features: Sequence[dict[str, Any]], tokenizer: Any, batch_size: int
    ) -> Iterator[Batch]:
        # One at a time, so that the batch size changes no mask.
        masking = _Masking(
            tokenizer, self.probability, torch.Generator().manual_seed(self.mask_seed)
        )
        for start in range(0, len(features), batch_size):
            rows = [masking([row]) for row in features[start : start + batch_size]]
            yield {
                key: padded([row[key][0] for row in rows], fill)
                for key, fill in masking.fills.items()
            }


_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What `_by_position` found."""


def _by_position(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Does the head of a model treat each position for itself, and is its loss the mean over those
    to predict? Found by trying, once a model.

    Args:
        model: With a masked-language head.
        inputs: A batch for it, of which a few pieces are tried.
    """
    if model not in _TRIED:
        config: Any = getattr(model, "config", None)
        _TRIED[model] = (
            unwrapped(model) is model
            and backbone(model) is not model
            and not getattr(config, "is_encoder_decoder", False)
            and _same_logits(model, {key: value[:1, :8] for key, value in inputs.items()})
        )
    return _TRIED[model]


def _same_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Are the logits of every second position those that the head gives without the others, and
    the model's loss the mean over them?"""
    ids = inputs["input_ids"]
    places = torch.arange(0, ids.numel(), 2, device=ids.device)
    labels = torch.full_like(ids, -100).flatten()
    labels[places] = ids.flatten()[places]
    # Without autocast: older versions of torch keep the weights that it casts here, and these have
    # no gradient in the training step around.
    with evaluating(model), torch.autocast(ids.device.type, enabled=False):
        own = model(**inputs, labels=labels.view_as(ids))
        try:
            found = _logits_at(model, inputs, places)[0]
        except (IndexError, RuntimeError, ValueError):
            return False  # it wants a sequence of the inputs' length
        expected = own.logits.flatten(0, 1)[places]
        if found.shape != expected.shape:
            return False
        loss = functional.cross_entropy(found.float(), labels[places])
    rounding = _ROUNDING if found.dtype.itemsize >= 4 else _HALF_ROUNDING
    return all(
        bool((a - b).abs().max() <= rounding * b.abs().max())
        for a, b in ((found, expected), (loss, own.loss))
    )


def _logits_at(model: nn.Module, inputs: Mapping[str, Tensor], places: Tensor) -> Tensor:
    """The logits of some positions, whose states are all that the head is given.

    Args:
        model: With a backbone whose last states the head reads.
        inputs: For the model, [batch, length].
        places: int64 [n], positions in the flat batch.

    Returns:
        float [1, n, vocabulary].
    """

    def keep(module: nn.Module, given: Any, output: Any) -> Any:
        states = getattr(output, "last_hidden_state", None)
        if states is not None and states.shape[:-1] == inputs["input_ids"].shape:
            output.last_hidden_state = states.flatten(0, 1).index_select(0, places)[None]
        return output

    handle = backbone(model).register_forward_hook(keep)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        handle.remove()
    return logits


@register
@dataclass(frozen=True)
class CausalLM(_LanguageModelling):
    """Causal language modelling: every piece from those before it. Each line ends a text."""

    name: ClassVar[str] = "clm"
    auto: ClassVar[str] = "AutoModelForCausalLM"

    def collate(self, tokenizer: Any) -> Collate:
        return _Following(tokenizer)

    def _end(self, tokenizer: Any, ids: list[int]) -> list[int]:
        end = tokenizer.eos_token_id
        return [] if end is None or ids[-1] == end else [end]

    def _predicted(self, labels: Tensor) -> int:
        return int((labels[:, 1:] != -100).sum())


class _Following:
    """Collates blocks for causal modelling; the model shifts the labels itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.fills = {
            "input_ids": int(tokenizer.pad_token_id),
            "attention_mask": 0,
            "labels": -100,
        }

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        columns = {"attention_mask": [torch.ones_like(row["input_ids"]) for row in rows]}
        for key in ("input_ids", "labels"):
            columns[key] = [row["input_ids"] for row in rows]
        return {key: padded(columns[key], fill) for key, fill in self.fills.items()}


class _Masking(_Following):
    """Collates blocks and masks them."""

    def __init__(
        self, tokenizer: Any, probability: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(tokenizer)
        unknown = tokenizer.unk_token_id
        self.special = torch.tensor([i for i in tokenizer.all_special_ids if i != unknown])
        self.mask_id = int(tokenizer.mask_token_id)
        self.vocabulary = len(tokenizer)
        self.probability = probability
        self.generator = generator

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        batch = super().__call__(rows)
        batch["input_ids"], batch["labels"] = mask_pieces(
            batch["input_ids"],
            torch.isin(batch["input_ids"], self.special),
            self.probability,
            self.mask_id,
            self.vocabulary,
            self.generator,
        )
        return batch


def mask_pieces(
    ids: Tensor,
    special: Tensor,
    probability: float,
    mask_id: int,
    vocabulary: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws the pieces to predict, at least one where any may be.

    Args:
        ids: int64 [batch, length].
        special: bool, the same shape: pieces that are never predicted.
        probability: Share to predict.
        mask_id: The piece that hides others.
        vocabulary: Random pieces are below it.
        generator: Of the draws; default: torch's random state.

    Returns:
        What the model reads, and what it must say: both int64 [batch, length], -100 where nothing.
    """
    drawn = torch.rand(ids.shape, generator=generator).masked_fill_(special, 2.0)
    # Were none drawn, the mean over none would be NaN.
    chosen = ((drawn < probability) | (drawn == drawn.min())) & ~special
    action = torch.rand(ids.shape, generator=generator)
    other = torch.randint(vocabulary, ids.shape, generator=generator)
    read = torch.where(chosen & (action < 0.8), mask_id, ids)
    read = torch.where(chosen & (action >= 0.9), other, read)
    return read, torch.where(chosen, ids, -100)
