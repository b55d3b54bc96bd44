"""The labelled tasks of the quickstart: the intent of a sentence, the slots that its words fill.

A task scores each sentence by counts, [numerator, denominator]: their sums over any sentences give
accuracy or F1, so that templates can be resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..delta import SparseDelta
from ..tasks.base import evaluating
from ..tasks.tokens import TokenClassification
from .intents import Corpus, Sentence
from .models import POOLED_SCALE, Classifier, load_encoder, pad
from .training import TaskRecipe, batches, by_length

Counts = list[list[int]]
LONGEST = 128
"""Pieces of a sentence; the longest of the data has half as many."""


class LabelledTask(Protocol):
    """What the quickstart needs to know of a task.

    Attributes:
        name: as the command calls it.
        metric: what the counts give, in words.
        recipe: hyper-parameters.
        labels: the classes, in order.
        tests: part ("source" or "target") -> its test sentences.
    """

    name: str
    metric: str
    recipe: TaskRecipe
    labels: list[str]
    tests: dict[str, list[Sentence]]

    def batches(self, size: int) -> Any:
        """Batches of the source's labelled sentences: re-iterable, with a length."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch."""

    def learn(self, model: nn.Module, fit: Callable[[], SparseDelta]) -> SparseDelta:
        """Run `fit` with what the model needs for it, and give its result."""

    def counts(self, model: nn.Module, part: str) -> Counts:
        """[numerator, denominator] of each of `tests[part]`, in order."""


class Intents:
    """Which intent a sentence has: a linear classifier on the mean of the states; accuracy.

    Args:
        corpus: the data.
        tokenizer: of the base.
        recipe: hyper-parameters.
    """

    name = "intents"
    metric = "accuracy"

    def __init__(self, corpus: Corpus, tokenizer: Any, recipe: TaskRecipe) -> None:
        self.recipe = recipe
        self.labels = list(corpus.intents)
        self.tests = {"source": corpus.source["test"], "target": corpus.target}
        self._train = corpus.source["train"]
        self._tokenizer = tokenizer

    def _rows(self, sentences: Sequence[Sentence]) -> tuple[list[list[int]], list[int]]:
        index = {intent: i for i, intent in enumerate(self.labels)}
        rows: list[list[int]] = self._tokenizer([s.text for s in sentences])["input_ids"]
        return rows, [index[s.intent] for s in sentences]

    def batches(self, size: int) -> Any:
        rows, labels = self._rows(self._train)

        def collate(chosen: list[int]) -> dict[str, Tensor]:
            ids, attention = pad([rows[i] for i in chosen], self._tokenizer.pad_token_id)
            wanted = torch.tensor([labels[i] for i in chosen])
            return {"ids": ids, "attention": attention, "labels": wanted}

        return batches([len(row) for row in rows], size, collate)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scores = model(batch["ids"], batch["attention"])
        return functional.cross_entropy(scores.float(), batch["labels"])

    def learn(self, model: nn.Module, fit: Callable[[], SparseDelta]) -> SparseDelta:
        return fit()

    def counts(self, model: nn.Module, part: str) -> Counts:
        rows, labels = self._rows(self.tests[part])
        out: Counts = [[0, 1] for _ in rows]
        with evaluating(model):
            for chosen in by_length(range(len(rows)), [len(row) for row in rows], 64):
                ids, attention = pad([rows[i] for i in chosen], self._tokenizer.pad_token_id)
                for i, label in zip(chosen, model(ids, attention).argmax(1).tolist(), strict=True):
                    out[i][0] = int(label == labels[i])
        return out


class Slots:
    """Which slot a word fills: token classification; F1 of whole slots, as seqeval counts them.

    Args:
        corpus: the data.
        tokenizer: of the base.
        recipe: hyper-parameters.
    """

    name = "slots"
    metric = "F1"

    def __init__(self, corpus: Corpus, tokenizer: Any, recipe: TaskRecipe) -> None:
        self.recipe = recipe
        self.tests = {part: corpus.renamed[part] for part in ("source", "target")}
        self._task = TokenClassification()
        self._train = self._examples(corpus.renamed["train"])
        self.labels = self._task.labels(self._train)
        self._tokenizer = tokenizer

    @staticmethod
    def _examples(sentences: Sequence[Sentence]) -> list[dict[str, Any]]:
        return [{"tokens": s.text.split(), "tags": list(s.tags)} for s in sentences]

    def _features(self, examples: list[dict[str, Any]], labels: list[str]) -> Any:
        return self._task.encode(examples, self._tokenizer, LONGEST, labels=labels)

    def batches(self, size: int) -> Any:
        features = self._features(self._train, self.labels)
        collate = self._task.collate(self._tokenizer)
        return batches(
            [len(f["input_ids"]) for f in features],
            size,
            lambda chosen: collate([features[i] for i in chosen]),
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self._task.loss(model, batch)

    def learn(self, model: nn.Module, fit: Callable[[], SparseDelta]) -> SparseDelta:
        # One learning rate serves classifier and encoder when the states are scaled (see
        # `POOLED_SCALE`); afterwards the classifier takes the factor over.
        head: nn.Module = model.classifier  # type: ignore[assignment]
        scaled = head.register_forward_pre_hook(lambda _, states: (POOLED_SCALE * states[0],))
        try:
            delta = fit()
        finally:
            scaled.remove()
        heads = {
            name: POOLED_SCALE * value if name == "classifier.weight" else value
            for name, value in delta.heads.items()
        }
        return SparseDelta(delta.support, delta.val, heads, delta.meta)

    def counts(self, model: nn.Module, part: str) -> Counts:
        examples = self._examples(self.tests[part])
        # A slot that English does not have is one that no prediction finds.
        features = self._features(examples, [*self.labels, *self._new(examples)])
        predicted = self._task.predict(model, features, examples, self._tokenizer, 64)
        return [self.count(e["tags"], tags) for e, tags in zip(examples, predicted, strict=True)]

    @staticmethod
    def count(gold: list[str], predicted: list[str]) -> list[int]:
        """Of a sentence: twice the slots found, and the slots there are plus those predicted."""
        from seqeval.metrics.sequence_labeling import get_entities

        there, said = set(get_entities(gold)), set(get_entities(predicted))
        return [2 * len(there & said), len(there) + len(said)]

    def _new(self, examples: list[dict[str, Any]]) -> list[str]:
        return sorted({tag for e in examples for tag in e["tags"]} - {*self.labels})


KINDS: dict[str, type[Intents] | type[Slots]] = {"intents": Intents, "slots": Slots}
"""The tasks by name."""
RECIPES = {"intents": TaskRecipe(), "slots": TaskRecipe()}
"""Chosen with Swiss German, Icelandic and Welsh as targets."""


def build(name: str, base: Path, labels: list[str], seed: int = 0) -> nn.Module:
    """The base encoder with a new head of a task.

    Args:
        name: of the task.
        base: the folder of the base.
        labels: the classes.
        seed: of the head's values.
    """
    if name == "slots":
        return TokenClassification().build(base, labels, seed=seed)
    torch.manual_seed(seed)
    return Classifier(load_encoder(str(base)), len(labels))
