"""Training of the quickstart: recipes, batches, and stage 0, language and task SFTs by `Loop`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler

from ..delta import SparseDelta
from ..families import freeze_norms
from ..files import new_file
from ..loop import Loop
from ..lottery import LotteryTicket, Phase
from ..tasks.lm import mask_pieces
from .models import MaskedLanguageModel, pad

if TYPE_CHECKING:
    from .tasks import LabelledTask

Tick = Callable[[float | None], None]
"""Called after each training step with its loss."""
Rows = Sequence[list[int]]
SAVE_EVERY = 60
"""Steps from one stored state to the next."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters, chosen with Swiss German, Icelandic and Welsh as targets.

    Attributes:
        batch: sentences in a batch.
        masked: share of the pieces masked.
        language_weight: weight of the language SFTs in compositions.
        language_density: share of the encoder's entries (norms excluded) selected.
        language_l1: λ of the L1 term in language SFTs.
        warm_up: share of the steps over which the learning rate rises; it falls to 0 after.
    """

    batch: int = 32
    masked: float = 0.25
    stage0_head_steps: int = 60
    stage0_head_lr: float = 2e-3
    stage0_steps: int = 160
    stage0_lr: float = 2e-4
    language_full_steps: int = 100
    language_sparse_steps: int = 100
    language_full_lr: float = 2e-4
    language_sparse_lr: float = 4e-4
    language_density: float = 0.08
    language_l1: float = 0.1
    language_weight: float = 0.5
    max_grad_norm: float = 1.0
    warm_up: float = 0.1


@dataclass(frozen=True)
class TaskRecipe:
    """Hyper-parameters of a task SFT.

    Attributes:
        density: share of the encoder's entries (norms excluded) selected.
    """

    full_steps: int = 60
    sparse_steps: int = 80
    full_lr: float = 2e-4
    sparse_lr: float = 4e-4
    density: float = 0.08


def shortened(recipe: Any, share: float) -> Any:
    """The same recipe with all step counts multiplied by `share`."""
    steps = {k: max(2, int(v * share)) for k, v in vars(recipe).items() if k.endswith("_steps")}
    return replace(recipe, **steps)


@dataclass(frozen=True)
class Pieces:
    """What the masked-language model needs to know of the vocabulary.

    Attributes:
        pad: id of the padding token.
        mask: id of the mask token.
        vocabulary: how many ids there are.
        predicted: int64 [classes], ascending: the input ids that occur in text, the classes of the
            masked-language head.
    """

    pad: int
    mask: int
    vocabulary: int
    predicted: Tensor

    def classes(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The classes of ids, and where an id has one: int64 and bool, the shape of `ids`."""
        classes = torch.searchsorted(self.predicted, ids).clamp_(max=len(self.predicted) - 1)
        return classes, self.predicted[classes] == ids


def derived_seed(*parts: object) -> int:
    """A seed for each purpose, from the run's seed and a name."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def native_precision() -> str | None:
    """ "bf16" where this processor multiplies bfloat16 in hardware, else None: float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if supported() else None


def by_length(rows: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows in batches of similar length; the last one may be smaller."""
    order = sorted(rows, key=lambda i: lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


class ByLength(Sampler[list[int]]):
    """Batches of rows of similar length, shuffled anew from torch's random state each time.

    Args:
        lengths: of the rows.
        size: rows in a batch; what is left over is left out.
    """

    def __init__(self, lengths: Sequence[int], size: int) -> None:
        self.lengths = lengths
        self.size = min(size, len(lengths))

    def __len__(self) -> int:
        return len(self.lengths) // self.size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.lengths)).tolist()
        for start in range(0, len(order), 8 * self.size):
            found = by_length(order[start : start + 8 * self.size], self.lengths, self.size)
            for i in torch.randperm(len(found)).tolist():
                if len(found[i]) == self.size:
                    yield found[i]


def batches(
    lengths: Sequence[int], size: int, collate: Callable[[list[int]], dict[str, Tensor]]
) -> DataLoader[int]:
    """A loader of batches of rows of similar length.

    Args:
        lengths: of the rows.
        size: rows in a batch.
        collate: from row numbers to a batch.
    """
    rows: Any = range(len(lengths))
    return DataLoader(rows, batch_sampler=ByLength(lengths, size), collate_fn=collate)


def masked_batches(rows: Rows, pieces: Pieces, recipe: Recipe) -> DataLoader[int]:
    """Batches for a `MaskedLanguageModel`, masked anew each time."""

    def collate(chosen: list[int]) -> dict[str, Tensor]:
        ids, attention = pad([rows[i] for i in chosen], pieces.pad)
        _, text = pieces.classes(ids)
        noisy, wanted = mask_pieces(ids, ~text, recipe.masked, pieces.mask, pieces.vocabulary)
        masked = wanted >= 0
        classes, _ = pieces.classes(wanted[masked])
        return {"ids": noisy, "attention": attention, "masked": masked, "classes": classes}

    return batches([len(row) for row in rows], recipe.batch, collate)


def masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of the masked pieces."""
    scores = model(batch["ids"], batch["attention"], batch["masked"])
    return functional.cross_entropy(scores.float(), batch["classes"])


def log_frequencies(rows: Rows, pieces: Pieces) -> Tensor:
    """Logarithms of the smoothed shares of the pieces in text, float32 [classes]."""
    classes, text = pieces.classes(torch.tensor([i for row in rows for i in row]))
    counts = torch.bincount(classes[text], minlength=len(pieces.predicted)) + 0.1
    return (counts / counts.sum()).log()


def _tune(model: nn.Module, loop: Loop, folder: Path) -> None:
    """Tune all that is trainable: the full phase of a ticket, of which nothing else is wanted."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    path = folder / "tuned.safetensors"

    def train(phase: Phase) -> None:
        if phase.name == "full":
            loop(phase)
            with new_file("quickstart", str(path)) as temporary:
                save_file({n: p for n, p in model.named_parameters() if n in trainable}, temporary)

    folder.mkdir(exist_ok=True)
    if not path.exists():
        ticket = LotteryTicket(model, k=1, eligible=trainable)
        ticket.fit(train, folder / "run", SAVE_EVERY, progress=False)
    model.load_state_dict(load_file(path), strict=False)


@dataclass(frozen=True)
class Setup:
    """What all steps of a quickstart share.

    Attributes:
        recipe: hyper-parameters.
        precision: of the matrix products (weights stay float32): "bf16" or None.
    """

    recipe: Recipe
    precision: str | None

    def autocast(self) -> torch.autocast:
        """The context in which models are tested."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision is not None)

    def loop(
        self,
        loader: DataLoader[int],
        loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
        full: int,
        sparse: int,
        lr: tuple[float, float],
        seed: int,
        tick: Tick,
    ) -> Loop:
        """The training loop of both phases."""

        def shown(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            value = loss(model, batch)
            tick(float(value.detach()))
            return value

        return Loop(
            loader, full, sparse, shown, lr, warmup=self.recipe.warm_up, seed=seed,
            max_grad_norm=self.recipe.max_grad_norm, precision=self.precision,
        )  # fmt: skip

    def stage0(
        self,
        encoder: nn.Module,
        pieces: Pieces,
        rows: Rows,
        seed: int,
        folder: Path,
        tick: Tick,
    ) -> MaskedLanguageModel:
        """Give an encoder a masked-language head and adapt first the head, then both.

        Args:
            encoder: the encoder; changed in place.
            pieces: the vocabulary.
            rows: id rows of the text, target and control language not among them.
            seed: of head, masks and order.
            folder: for the state.
            tick: called after each step.
        """
        recipe = self.recipe
        torch.manual_seed(derived_seed(seed, "head"))
        model = MaskedLanguageModel(encoder, pieces.predicted)
        with torch.no_grad():
            model.decoder.bias.copy_(log_frequencies(rows, pieces))
        freeze_norms(encoder)
        body = [p for p in encoder.parameters() if p.requires_grad]
        loader = masked_batches(rows, pieces, recipe)
        parts = [
            ("head", recipe.stage0_head_steps, recipe.stage0_head_lr),
            ("all", recipe.stage0_steps, recipe.stage0_lr),
        ]
        for part, steps, lr in parts:
            for parameter in body:
                parameter.requires_grad_(part == "all")
            loop = self.loop(
                loader, masked_loss, steps, steps, (lr, lr), derived_seed(seed, part), tick
            )
            _tune(model, loop, folder / part)
        return model

    def language_sft(
        self,
        model: MaskedLanguageModel,
        pieces: Pieces,
        language: str,
        rows: Rows,
        seed: int,
        folder: Path,
        tick: Tick,
    ) -> SparseDelta:
        """Learn a language SFT from unlabelled text: full tuning, selection, sparse tuning.

        The head starts from the frequencies of the language's pieces: what the encoder then learns
        is how they hang together, not how often each occurs.

        Args:
            model: encoder and head of stage 0.
            pieces: the vocabulary.
            language: code of the language.
            rows: id rows of its text.
            seed: of masks and order.
            folder: for the state.
            tick: called after each step.

        Returns:
            φ, its masked-language head left out.
        """
        recipe = self.recipe
        freeze_norms(model.encoder)
        with torch.no_grad():
            model.decoder.bias.copy_(log_frequencies(rows, pieces))
        loop = self.loop(
            masked_batches(rows, pieces, recipe),
            masked_loss,
            recipe.language_full_steps,
            recipe.language_sparse_steps,
            (recipe.language_full_lr, recipe.language_sparse_lr),
            derived_seed(seed, language),
            tick,
        )
        ticket = LotteryTicket(
            model, density=recipe.language_density, l1=recipe.language_l1, seed=seed
        )
        delta = ticket.fit(loop, folder, SAVE_EVERY, progress=False, role="language", lang=language)
        return SparseDelta(delta.support, delta.val, None, delta.meta)

    def task_sft(
        self,
        task: LabelledTask,
        model: nn.Module,
        seed: int,
        folder: Path,
        tick: Tick,
        after_full: Callable[[], None],
    ) -> SparseDelta:
        """Learn a task SFT from labelled sentences of the source language.

        Args:
            task: what is learnt.
            model: the base encoder with the task's head.
            seed: of the order.
            folder: for the state.
            tick: called after each step.
            after_full: called with the fully tuned model in place.

        Returns:
            φ with its head.
        """
        recipe = task.recipe
        freeze_norms(model)
        loop = self.loop(
            task.batches(self.recipe.batch),
            task.loss,
            recipe.full_steps,
            recipe.sparse_steps,
            (recipe.full_lr, recipe.sparse_lr),
            derived_seed(seed, task.name),
            tick,
        )

        def train(phase: Phase) -> None:
            loop(phase)
            if phase.name == "full":
                after_full()

        ticket = LotteryTicket(model, density=recipe.density, seed=seed)
        return task.learn(
            model,
            lambda: ticket.fit(
                train, folder, SAVE_EVERY, progress=False, role="task", task=task.name, lang="en"
            ),
        )
