"""Sequence classification: sentiment, inference between two sentences, intents."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

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
from .heads import load_model
from .metrics import accuracy, macro_f1

__all__ = ["SequenceClassification"]


@register
@dataclass(frozen=True)
class SequenceClassification(Task):
    """One label a text, or a pair of texts.

    The head is transformers' own. On BERT and XLM-R it has two layers on the first piece, as in the
    LT-SFT paper: a dense one with tanh, and a linear one. BERT's dense layer is its pooler, which
    is pretrained and of the backbone, so its entries are selected among; XLM-R's is of the head.

    An encoder of sentences such as E5 has its meaning in the mean of the last states, and no
    pooler: with pooling="mean", the head is transformers' own for tokens, most often one linear
    layer, and a text's scores are the means of those of its pieces, special ones included.

    Attributes:
        metric: "accuracy", or "f1" (macro, over the labels that occur).
        text: The field that holds the text, or the premise.
        pair: The field that holds the second text, or the hypothesis.
        label: The field that holds the label.
        pooling: "mean", or None: as transformers' head has it.
    """

    name: ClassVar[str] = "sequences"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    fills: ClassVar[dict[str, int]] = {"labels": -100}

    metric: str = "accuracy"
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    pooling: str | None = None

    def __post_init__(self) -> None:
        if self.metric not in ("accuracy", "f1"):
            raise ValueError(f'metric is {self.metric!r}; sequences have "accuracy" and "f1"')
        if self.pooling not in (None, "mean"):
            raise ValueError(f'pooling is {self.pooling!r}; it must be "mean", or none')

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
        auto = self.auto if self.pooling is None else "AutoModelForTokenClassification"
        model = load_model(base, auto, labels=labels, seed=seed, **options)
        config: Any = model.config
        if config.pad_token_id is None:
            # Decoders classify the last piece that is not padding.
            config.pad_token_id = self.tokenizer(base).pad_token_id
        return model

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The scores that a model gives the labels, fp32 [batch, labels].

        Args:
            model: As `build` gives it.
            batch: Features of texts on the model's device, without labels.
        """
        found: Tensor = model(**batch).logits.float()
        if self.pooling is None:
            return found
        read = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        weight = read[..., None].float()
        return (found * weight).sum(1) / weight.sum(1)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if self.pooling is None:
            return super().loss(model, batch)
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items()}
        labels = inputs.pop("labels")
        return functional.cross_entropy(self.scores(model, inputs), labels)

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
                classes = self.scores(model, batch).argmax(-1).tolist()
                for i, label in zip(chosen, classes, strict=True):
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
