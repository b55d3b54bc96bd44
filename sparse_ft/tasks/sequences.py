"""Sequence classification: sentiment, inference between two sentences, intents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .base import (
    Features,
    Task,
    batches,
    check_length,
    evaluating,
    field,
    for_model,
    head_labels,
    label_ids,
    register,
    unknown_label,
)
from .data import DataError, Examples, source_of
from .metrics import accuracy, macro_f1

__all__ = ["SequenceClassification"]


@register
@dataclass(frozen=True)
class SequenceClassification(Task):
    """One label a text, or a pair of texts.

    The head is transformers' own. On BERT and XLM-R it has two layers on the first piece, as in the
    LT-SFT paper: a dense one with tanh, and a linear one. BERT's dense layer is its pooler, which
    is pretrained and of the backbone, so its entries are selected among; XLM-R's is of the head.

    Attributes:
        metric: "accuracy", or "f1" (macro, over the labels that occur).
        text: The field that holds the text, or the premise.
        pair: The field that holds the second text, or the hypothesis.
        label: The field that holds the label.
    """

    name: ClassVar[str] = "sequences"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    fills: ClassVar[dict[str, int]] = {"labels": -100}

    metric: str = "accuracy"
    text: str = "text"
    pair: str | None = None
    label: str = "label"

    def __post_init__(self) -> None:
        if self.metric not in ("accuracy", "f1"):
            raise ValueError(f'metric is {self.metric!r}; sequences have "accuracy" and "f1"')

    def checked(self, examples: Examples) -> Examples:
        rows = []
        for i, row in enumerate(examples):
            field(examples, i, self.text, str)
            if self.pair is not None:
                field(examples, i, self.pair, str)
            label = str(field(examples, i, self.label, (str, int)))
            if not label:
                raise DataError(f"{examples.where(i)}: {self.label!r} is empty")
            rows.append({**row, self.label: label})
        return examples.replaced(rows)

    def labels(self, examples: Sequence[dict[str, Any]]) -> list[str]:
        found = sorted({example[self.label] for example in examples})
        if len(found) < 2:
            raise DataError(f"{source_of(examples)}: has one label, {found}; two are needed")
        return found

    def build(
        self,
        base: str | os.PathLike[str],
        labels: Sequence[str] | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> nn.Module:
        model = super().build(base, labels, seed=seed, **options)
        config: Any = model.config
        if config.pad_token_id is None:
            # Decoders classify the last piece that is not padding.
            config.pad_token_id = self.tokenizer(base).pad_token_id
        return model

    def encode(
        self,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        max_length: int,
        *,
        labels: Sequence[str] | None = None,
    ) -> Features:
        ids = label_ids(labels)
        check_length(tokenizer, max_length, least=2, pair=self.pair is not None)
        features = []
        for i, example in enumerate(examples):
            if example[self.label] not in ids:
                raise unknown_label(examples, i, example[self.label], labels)
            encoding = tokenizer(
                example[self.text],
                example[self.pair] if self.pair is not None else None,
                truncation=True,
                max_length=max_length,
                verbose=False,
            )
            features.append({**for_model(encoding), "labels": ids[example[self.label]]})
        if not features:
            raise DataError(f"{source_of(examples)}: holds no example")
        return features

    def predict(
        self,
        model: nn.Module,
        features: Features,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        batch_size: int = 32,
    ) -> list[str]:
        """The label that a model gives to each example; arguments as of `evaluate`."""
        names = head_labels(model)
        device = next(model.parameters()).device
        predicted = [""] * len(features)
        with evaluating(model):
            for chosen, batch in batches(features, self.collate(tokenizer), batch_size, device):
                batch.pop("labels")
                for i, label in zip(chosen, model(**batch).logits.argmax(-1).tolist(), strict=True):
                    predicted[i] = names[label]
        return predicted

    def gold(self, examples: Sequence[dict[str, Any]]) -> list[str]:
        return [example[self.label] for example in examples]

    def score(
        self, predicted: Sequence[str], examples: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        gold = self.gold(examples)
        return {
            "accuracy": accuracy(predicted, gold),
            "f1": macro_f1(predicted, gold),
            "n": float(len(gold)),
        }
