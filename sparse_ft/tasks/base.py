"""Task: what there is to know of a task to train it and to score it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..families import unwrapped
from ..kept import modes_kept
from . import data
from .data import DataError, Examples
from .heads import load_model, load_tokenizer

__all__ = ["TASKS", "Batch", "Collate", "Task", "label_ids", "register"]

Batch = dict[str, Tensor]
Features = Sequence[dict[str, Any]]
Collate = Callable[[list[dict[str, Any]]], Batch]

# What models take from a tokenizer, and what fills it up; the tokenizer says it of "input_ids".
_FILLS = {"attention_mask": 0, "token_type_ids": 0}

TASKS: dict[str, type[Task]] = {}
"""The tasks by name."""


@dataclass(frozen=True)
class Task(ABC):
    """A task: its data, its head, its loss and its metric.

    A task holds its options and nothing else: `dataclasses.asdict(task)` goes into the metadata of
    an SFT, and `TASKS[name](**options)` is the task again.

    Attributes:
        name: What it is called.
        role: "language" or "task": what its SFT is for.
        auto: The class of transformers that knows its head.
        words: Whether it reads words rather than text.
        plain: What a `.txt` file holds for it.
        fills: Its features besides the tokenizer's, and what fills them up in a batch.
        metric: The figure that the best checkpoint is chosen by.
    """

    name: ClassVar[str]
    role: ClassVar[str] = "task"
    auto: ClassVar[str]
    words: ClassVar[bool] = False
    plain: ClassVar[str] = "text"
    fills: ClassVar[Mapping[str, int]] = {}

    metric: str

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric not in ("loss", "perplexity")

    def read(
        self, source: str | os.PathLike[str], split: str | None = None, **options: Any
    ) -> Examples:
        """Reads examples; see `data.read`.

        Args:
            source: A file, a folder, or the name of a data set.
            split: Which part, where there are several.
            **options: Of `data.read`, such as format.

        Raises:
            DataError: They cannot be read, or are not examples of this task.
        """
        return self.checked(data.read(source, split=split, plain=self.plain, **options))

    def checked(self, examples: Examples) -> Examples:
        """Rows as examples of this task, each with the fields that it needs; `examples` stays.

        Raises:
            DataError: A field is missing or malformed; it names the file and the line.
        """
        return examples

    def labels(self, examples: Sequence[dict[str, Any]]) -> list[str] | None:
        """What the head tells apart, from the examples to train on; None for a task without.

        Raises:
            DataError: They are not labels of this task.
        """
        return None

    def build(
        self,
        base: str | os.PathLike[str],
        labels: Sequence[str] | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> nn.Module:
        """The model under this task's head, to train or to put a trained head on.

        Args:
            base: A folder with a model, or its name on the Hub.
            labels: As `labels` gives them, or as an SFT records them.
            seed: Of the values of a new head.
            **options: Of transformers' `from_pretrained`.

        Raises:
            OSError: There is no such model.
            ValueError: There is no such head for it.
        """
        return load_model(base, self.auto, labels=labels, seed=seed, **options)

    def tokenizer(self, base: str | os.PathLike[str]) -> Any:
        """The tokenizer of a model, as this task needs it.

        Raises:
            OSError: There is none.
        """
        return load_tokenizer(base, words=self.words)

    @abstractmethod
    def encode(
        self,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        max_length: int,
        *,
        labels: Sequence[str] | None = None,
    ) -> Features:
        """Examples as features, each what a model reads at once.

        Args:
            examples: As `read` gives them.
            tokenizer: As `tokenizer` gives it.
            max_length: The most pieces of a feature.
            labels: What the model's head tells apart.

        Raises:
            DataError: Nothing is left, or an example has another label.
            ValueError: max_length is more than the model reads, or leaves no room.
        """

    def collate(self, tokenizer: Any) -> Collate:
        """A function from a list of features to a batch, for a `DataLoader`."""
        return Padding(tokenizer, self.fills)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, fp32 []; the batch is moved to the model's device."""
        device = next(model.parameters()).device
        found: Tensor = model(**{key: value.to(device) for key, value in batch.items()}).loss
        return found

    def evaluate(
        self,
        model: nn.Module,
        features: Features,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        batch_size: int = 32,
    ) -> dict[str, float]:
        """Scores a model; leaves its mode and the random state as they were.

        Args:
            model: As `build` gives it.
            features: Of the examples.
            examples: What the features were made of.
            tokenizer: What they were made with.
            batch_size: Features at once; it does not change what is measured.

        Returns:
            Figures by name, shares between 0 and 1; `metric` is among them, and "n", the items
            that they are figures of.
        """
        return self.score(self.predict(model, features, examples, tokenizer, batch_size), examples)

    def predict(
        self,
        model: nn.Module,
        features: Features,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        batch_size: int = 32,
    ) -> list[Any]:
        """What a model says of each example, as JSON holds it; arguments as of `evaluate`.

        Raises:
            TypeError: The task predicts nothing of an example: what it measures is a loss.
        """
        raise self._scored_by_its_loss()

    def gold(self, examples: Sequence[dict[str, Any]]) -> list[Any]:
        """What is true of each example, in the form of `predict`.

        Raises:
            TypeError: As `predict`.
        """
        raise self._scored_by_its_loss()

    def score(
        self, predicted: Sequence[Any], examples: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """The figures of `evaluate`, from what `predict` gave.

        Raises:
            TypeError: As `predict`.
        """
        raise self._scored_by_its_loss()

    def _scored_by_its_loss(self) -> TypeError:
        return TypeError(f"{self.name} predicts nothing of an example; it is scored by its loss")


T = TypeVar("T", bound=type[Task])


def register(task: T) -> T:
    """Adds a task to `TASKS` under its name."""
    TASKS[task.name] = task
    return task


class Padding:
    """Collates features to tensors int64 [batch, length], filled up on the right.

    Args:
        tokenizer: Knows the padding piece.
        fills: Further features that models take, and what fills them up; the rest of a feature is
            not for the model and is left out.
    """

    def __init__(self, tokenizer: Any, fills: Mapping[str, int] = {}) -> None:
        self.fills = {"input_ids": int(tokenizer.pad_token_id), **_FILLS, **fills}

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        return {
            key: padded([row[key] for row in rows], fill)
            for key, fill in self.fills.items()
            if key in rows[0]
        }


def padded(rows: Sequence[Any], fill: int) -> Tensor:
    """Numbers as int64 [n], or lists of numbers as int64 [n, longest]."""
    if isinstance(rows[0], int):
        return torch.tensor(rows)
    out = torch.full((len(rows), max(map(len, rows))), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row)
    return out


def for_model(encoding: Mapping[str, Any]) -> dict[str, Any]:
    """Of an encoding, what models take."""
    return {key: encoding[key] for key in ("input_ids", *_FILLS) if key in encoding}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the modes of all modules come back."""
    # Not inference_mode: what a model caches under it, rotary tables say, cannot be trained with
    # afterwards.
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


def batches(
    features: Features, collate: Collate, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Features in batches of about one length, with their positions."""
    if not features:
        raise DataError("there is nothing to evaluate: no features")
    order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([features[i] for i in chosen])
        yield chosen, {key: value.to(device) for key, value in batch.items()}


def check_length(tokenizer: Any, max_length: int, least: int = 1, pair: bool = False) -> int:
    """Room for text within max_length, beside the tokenizer's special pieces.

    Raises:
        ValueError: There are not `least` pieces of room, or the model reads less than max_length.
    """
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}; the tokenizer says that the model reads at most "
            f"{tokenizer.model_max_length} pieces; set max_length to that, or to less"
        )
    if max_length < special + least:
        raise ValueError(
            f"max_length is {max_length}; {special + least} is the least ({special} special pieces)"
        )
    return int(max_length - special)


def label_ids(labels: Sequence[str] | None) -> dict[str, int]:
    """Label → its class.

    Raises:
        ValueError: No labels are given.
    """
    if not labels:
        raise ValueError("labels are needed, in the order of the model's head")
    return {label: i for i, label in enumerate(labels)}


def unknown_label(
    examples: Sequence[dict[str, Any]], i: int, label: Any, known: Any, hint: str = ""
) -> DataError:
    """The error for a label that the head does not tell apart."""
    names = ", ".join(map(str, known))
    return DataError(
        f"{data.where(examples, i)}: the label {label!r} is not one of the model's "
        f"{len(known)} labels ({names}){hint}"
    )


def head_labels(model: nn.Module) -> list[str]:
    """The labels that a model's head tells apart, in order."""
    config: Any = unwrapped(model).config
    return [config.id2label[i] for i in range(len(config.id2label))]


def field(examples: Examples, i: int, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of an example.

    Raises:
        DataError: It is missing, or of another type.
    """
    row = examples[i]
    if name not in row:
        there = ", ".join(row) or "none"
        raise DataError(f"{examples.where(i)}: there is no field {name!r}; there are: {there}")
    if not isinstance(row[name], kind):
        names = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise DataError(
            f"{examples.where(i)}: {name!r} must be {names}, found {str(row[name])[:40]!r}"
        )
    return row[name]
