"""Training of the quickstart: stage 0, language SFTs, task SFT; batches, masking, evaluation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..delta import SparseDelta
from ..families import freeze_norms
from ..lottery import LotteryTicket, Phase
from .models import Classifier, MaskedLanguageModel, pad

Tick = Callable[[float], None]
"""Called after each training step with its loss."""
Rows = Sequence[list[int]]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters, chosen with Swiss German, Icelandic and Welsh as targets.

    Attributes:
        batch: sentences in a batch.
        masked: share of the pieces masked.
        language_weight: weight of the language SFTs in compositions.
        language_density, task_density: share of the encoder's entries (norms excluded) selected.
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
    task_full_steps: int = 60
    task_sparse_steps: int = 80
    task_full_lr: float = 2e-4
    task_sparse_lr: float = 4e-4
    task_density: float = 0.08
    max_grad_norm: float = 1.0
    warm_up: float = 0.1

    def scaled(self, share: float) -> Recipe:
        """The same recipe with all step counts multiplied by `share`."""
        steps = {k: max(2, int(v * share)) for k, v in vars(self).items() if k.endswith("_steps")}
        return Recipe(**{**vars(self), **steps})


@dataclass(frozen=True)
class Pieces:
    """What the trainers need to know of the vocabulary.

    Attributes:
        pad: id of the padding token.
        mask: id of the mask token.
        predicted: int64 [classes], ascending: the input ids that occur in text, the classes of the
            masked-language head.
    """

    pad: int
    mask: int
    predicted: Tensor


def derived_seed(*parts: object) -> int:
    """A seed for each purpose, from the run's seed and a name."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def native_precision() -> torch.dtype:
    """bfloat16 where this processor multiplies it in hardware, else float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else torch.float32


def batches(rows: Rows, size: int, steps: int, seed: int) -> list[list[int]]:
    """Row numbers of `steps` batches: shuffled passes, rows of similar length together."""
    rng = random.Random(seed)
    out: list[list[int]] = []
    size = min(size, len(rows))
    while len(out) < steps:
        order = list(range(len(rows)))
        rng.shuffle(order)
        for start in range(0, len(order), 8 * size):
            window = sorted(order[start : start + 8 * size], key=lambda i: len(rows[i]))
            cut = [window[i : i + size] for i in range(0, len(window), size)]
            rng.shuffle(cut)
            out += [b for b in cut if len(b) == size]
    return out[:steps]


def mask_rows(
    ids: Tensor, pieces: Pieces, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask pieces as BERT does: 80 % mask token, 10 % another piece, 10 % unchanged.

    Args:
        ids: int64 [batch, length].
        pieces: the vocabulary.
        share: share of the pieces that is masked, in (0, 1); at least one is.
        generator: the source of choices.

    Returns:
        Masked ids, the masked positions (bool, same shape), their classes (int64).
    """
    classes = torch.searchsorted(pieces.predicted, ids).clamp_(max=len(pieces.predicted) - 1)
    text = pieces.predicted[classes] == ids
    drawn = torch.rand(ids.shape, generator=generator).masked_fill_(~text, 2.0)
    masked = (drawn < share) | (drawn == drawn.min())
    action = torch.rand(ids.shape, generator=generator)
    random_ids = pieces.predicted[
        torch.randint(len(pieces.predicted), ids.shape, generator=generator)
    ]
    noisy = torch.where(masked & (action < 0.8), pieces.mask, ids)
    noisy = torch.where(masked & (action >= 0.9), random_ids, noisy)
    return noisy, masked, classes[masked]


def log_frequencies(rows: Rows, pieces: Pieces) -> Tensor:
    """Logarithms of the smoothed shares of the pieces in text, float32 [classes]."""
    ids = torch.tensor([i for row in rows for i in row])
    classes = torch.searchsorted(pieces.predicted, ids).clamp_(max=len(pieces.predicted) - 1)
    text = pieces.predicted[classes] == ids
    counts = torch.bincount(classes[text], minlength=len(pieces.predicted)) + 0.1
    return (counts / counts.sum()).log()


def _clip(parameters: list[nn.Parameter], max_norm: float) -> Callable[..., None]:
    """A step hook that clips the norm of the gradients."""

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)

    return clip


class Trainer:
    """Runs the recipe's steps; a training function for `LotteryTicket` is one of its closures.

    Args:
        recipe: hyper-parameters.
        pieces: the vocabulary.
        precision: data type of the matrix products (weights stay float32).
    """

    def __init__(self, recipe: Recipe, pieces: Pieces, precision: torch.dtype) -> None:
        self.recipe = recipe
        self.pieces = pieces
        self.precision = precision

    def autocast(self) -> torch.autocast:
        """The context in which models run."""
        enabled = self.precision != torch.float32
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    def _loop(
        self,
        optimizer: torch.optim.Optimizer,
        steps: Iterable[list[int]],
        count: int,
        loss_of: Callable[[list[int]], Tensor],
        tick: Tick,
    ) -> float:
        """Train; linear warm-up, linear decay. Returns the mean loss of the last fifth."""
        rise = max(1, int(self.recipe.warm_up * count))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / rise, 1.0) * (1 - i / count)
        )
        losses = []
        for batch in steps:
            loss = loss_of(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
            tick(losses[-1])
        tail = losses[-max(1, count // 5) :]
        return sum(tail) / len(tail)

    def _masked_loss(
        self, model: MaskedLanguageModel, rows: Rows, seed: int
    ) -> Callable[[list[int]], Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def loss_of(batch: list[int]) -> Tensor:
            ids, attention = pad([rows[i] for i in batch], self.pieces.pad)
            noisy, masked, classes = mask_rows(ids, self.pieces, self.recipe.masked, generator)
            with self.autocast():
                scores = model(noisy, attention, masked)
            return functional.cross_entropy(scores.float(), classes)

        return loss_of

    def stage0(self, encoder: nn.Module, rows: Rows, seed: int, tick: Tick) -> MaskedLanguageModel:
        """Give an encoder a masked-language head and adapt both, densely.

        Args:
            encoder: the encoder; changed in place.
            rows: id rows of the text, target and control language not among them.
            seed: of head, masks and order.
            tick: called after each step.
        """
        recipe = self.recipe
        torch.manual_seed(derived_seed(seed, "head"))
        model = MaskedLanguageModel(encoder, self.pieces.predicted)
        with torch.no_grad():
            model.decoder.bias.copy_(log_frequencies(rows, self.pieces))
        freeze_norms(encoder)
        trainable = [p for p in encoder.parameters() if p.requires_grad]
        head = [
            p for name, p in model.named_parameters()
            if p.requires_grad and not name.startswith("encoder.")
        ]  # fmt: skip
        parts = [
            ("head", head, recipe.stage0_head_steps, recipe.stage0_head_lr),
            ("all", trainable + head, recipe.stage0_steps, recipe.stage0_lr),
        ]
        for part, parameters, count, lr in parts:
            for parameter in trainable:
                parameter.requires_grad_(part == "all")
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
            optimizer.register_step_pre_hook(_clip(parameters, recipe.max_grad_norm))
            steps = batches(rows, recipe.batch, count, derived_seed(seed, part, "order"))
            loss_of = self._masked_loss(model, rows, derived_seed(seed, part, "masks"))
            self._loop(optimizer, steps, count, loss_of, tick)
        return model

    def language_sft(
        self,
        model: MaskedLanguageModel,
        language: str,
        rows: Rows,
        seed: int,
        tick: Tick,
    ) -> tuple[SparseDelta, dict[str, float]]:
        """Learn a language SFT from unlabelled text: full tuning, selection, sparse tuning.

        The head starts from the frequencies of the language's pieces: what the encoder then learns
        is how they hang together, not how often each occurs.

        Args:
            model: encoder and head of stage 0.
            language: code of the language.
            rows: id rows of its text.
            seed: of masks and order.
            tick: called after each step.

        Returns:
            φ, its masked-language head left out, and the training losses of both phases.
        """
        recipe = self.recipe
        losses: dict[str, float] = {}
        with torch.no_grad():
            model.decoder.bias.copy_(log_frequencies(rows, self.pieces))

        def train(phase: Phase) -> None:
            full = phase.name == "full"
            count = recipe.language_full_steps if full else recipe.language_sparse_steps
            lr = recipe.language_full_lr if full else recipe.language_sparse_lr
            optimizer = phase.optimizer(lr=lr, weight_decay=0.0, max_grad_norm=recipe.max_grad_norm)
            name = f"{language} {phase.name}"
            steps = batches(rows, recipe.batch, count, derived_seed(seed, name, "order"))
            loss_of = self._masked_loss(model, rows, derived_seed(seed, name, "masks"))
            losses[phase.name] = self._loop(optimizer, steps, count, loss_of, tick)

        ticket = LotteryTicket(
            model, density=recipe.language_density, l1=recipe.language_l1, seed=seed
        )
        delta = ticket.fit(train, role="language", lang=language)
        return SparseDelta(delta.support, delta.val, None, delta.meta), losses

    def task_sft(
        self,
        model: Classifier,
        rows: Rows,
        labels: Sequence[int],
        seed: int,
        tick: Tick,
        after_full: Callable[[], None],
    ) -> tuple[SparseDelta, dict[str, float]]:
        """Learn the task SFT from labelled sentences of the source language.

        Args:
            model: the classifier over the base encoder.
            rows: id rows of the sentences.
            labels: their labels.
            seed: of the order.
            tick: called after each step.
            after_full: called with the fully tuned model in place.

        Returns:
            φ with its classifier, and the training losses of both phases.
        """
        recipe = self.recipe
        target = torch.tensor(list(labels))
        losses: dict[str, float] = {}

        def loss_of(batch: list[int]) -> Tensor:
            ids, attention = pad([rows[i] for i in batch], self.pieces.pad)
            with self.autocast():
                scores = model(ids, attention)
            return functional.cross_entropy(scores.float(), target[torch.tensor(batch)])

        def train(phase: Phase) -> None:
            full = phase.name == "full"
            count = recipe.task_full_steps if full else recipe.task_sparse_steps
            lr = recipe.task_full_lr if full else recipe.task_sparse_lr
            optimizer = phase.optimizer(lr=lr, weight_decay=0.0, max_grad_norm=recipe.max_grad_norm)
            order = derived_seed(seed, "task", phase.name)
            steps = batches(rows, recipe.batch, count, order)
            losses[phase.name] = self._loop(optimizer, steps, count, loss_of, tick)
            if full:
                after_full()

        ticket = LotteryTicket(model, density=recipe.task_density, seed=seed)
        return ticket.fit(train, role="task", task="intents", lang="en"), losses

    @torch.inference_mode()
    def correct(self, model: Classifier, rows: Rows, labels: Sequence[int]) -> list[bool]:
        """Which rows the classifier labels correctly, in their order."""
        out = [False] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            ids, attention = pad([rows[i] for i in chosen], self.pieces.pad)
            with self.autocast():
                scores = model(ids, attention)
            for i, label in zip(chosen, scores.argmax(1).tolist(), strict=True):
                out[i] = label == labels[i]
        return out
