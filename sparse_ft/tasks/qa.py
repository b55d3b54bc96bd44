"""Extractive question answering, as SQuAD v1.1 has it: the answer is a span of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import (
    Features,
    Task,
    batches,
    check_length,
    evaluating,
    field,
    for_model,
    register,
)
from .data import DataError, Examples, source_of, where
from .metrics import squad

__all__ = ["QuestionAnswering", "best_spans"]


@register
@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Start and end of the answer among the pieces of the context.

    A context too long for the model is read in windows that overlap by `stride` pieces. In
    training, a window without the whole answer answers with its first piece; in evaluation, the
    span of the largest start + end score over all windows is the answer.

    Attributes:
        metric: "f1" or "exact_match".
        stride: Pieces that neighbouring windows share.
        max_answer: The most pieces of an answer.
    """

    name: ClassVar[str] = "qa"
    auto: ClassVar[str] = "AutoModelForQuestionAnswering"
    fills: ClassVar[dict[str, int]] = {"start_positions": 0, "end_positions": 0}

    metric: str = "f1"
    stride: int = 128
    max_answer: int = 30

    def __post_init__(self) -> None:
        if self.metric not in ("f1", "exact_match"):
            raise ValueError(f'metric is {self.metric!r}; qa has "f1" and "exact_match"')
        if self.stride < 0 or self.max_answer < 1:
            raise ValueError(
                f"stride must be 0 or more and max_answer 1 or more, got {self.stride} and "
                f"{self.max_answer}"
            )

    def checked(self, examples: Examples) -> Examples:
        seen: set[str] = set()
        rows = []
        for i, row in enumerate(examples):
            question = field(examples, i, "question", str).strip()
            context = field(examples, i, "context", str)
            answers = _answers(field(examples, i, "answers", (dict, list)))
            if not question or not context.strip():
                raise DataError(f"{examples.where(i)}: the question or the context is empty")
            if not answers:
                raise DataError(
                    f"{examples.where(i)}: has no answers (text and answer_start); questions "
                    "without an answer are not of this task"
                )
            for start, text in answers:
                if not text.strip() or context[start : start + len(text)] != text:
                    raise DataError(
                        f"{examples.where(i)}: the context does not say {text!r} at character "
                        f"{start}"
                    )
            name = str(row.get("id", i))
            if name in seen:
                raise DataError(f"{examples.where(i)}: the id {name!r} stands there twice")
            seen.add(name)
            # No piece of the context is a space alone.
            trimmed = [(s + len(t) - len(t.lstrip()), t.strip()) for s, t in answers]
            rows.append({"id": name, "question": question, "context": context, "answers": trimmed})
        return examples.replaced(rows)

    def encode(
        self,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        max_length: int,
        *,
        labels: Sequence[str] | None = None,
    ) -> Features:
        room = check_length(tokenizer, max_length, least=self.stride + 2, pair=True)
        features = []
        for i, example in enumerate(examples):
            question = tokenizer(example["question"], add_special_tokens=False, verbose=False)
            if room - len(question["input_ids"]) <= self.stride:
                raise DataError(
                    f"{where(examples, i)}: the question takes {len(question['input_ids'])} of "
                    f"{room} pieces, which leaves no room for a context with stride {self.stride}; "
                    "raise max_length or lower stride"
                )
            encoding = tokenizer(
                example["question"],
                example["context"],
                truncation="only_second",
                max_length=max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            columns = for_model(encoding)
            for window, offsets in enumerate(encoding["offset_mapping"]):
                text = [p for p, s in enumerate(encoding.sequence_ids(window)) if s == 1]
                if not text:
                    raise DataError(f"{where(examples, i)}: the tokenizer leaves no context")
                start, end = _span(offsets, text, *example["answers"][0])
                features.append(
                    {
                        **{key: rows[window] for key, rows in columns.items()},
                        "start_positions": start,
                        "end_positions": end,
                        "example": i,
                        "text": (text[0], text[-1]),
                        "offsets": offsets,
                    }
                )
        if not features:
            raise DataError(f"{source_of(examples)}: holds no question")
        return features

    def predict(
        self,
        model: nn.Module,
        features: Features,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        batch_size: int = 32,
    ) -> list[str]:
        """The answer that a model gives to each question; arguments as of `evaluate`."""
        device = next(model.parameters()).device
        best: dict[int, tuple[float, str]] = {}
        with evaluating(model):
            for chosen, batch in batches(features, self.collate(tokenizer), batch_size, device):
                del batch["start_positions"], batch["end_positions"]
                output = model(**batch)
                inside = torch.tensor([features[i]["text"] for i in chosen], device=device)
                spans = best_spans(output.start_logits, output.end_logits, inside, self.max_answer)
                for i, start, end, score in zip(chosen, *(s.tolist() for s in spans), strict=True):
                    feature = features[i]
                    example, offsets = feature["example"], feature["offsets"]
                    context = examples[example]["context"]
                    found = score, context[offsets[start][0] : offsets[end][1]].strip()
                    best[example] = max(best.get(example, found), found)
        return [best[i][1] for i in range(len(examples))]

    def gold(self, examples: Sequence[dict[str, Any]]) -> list[list[str]]:
        """The answers to each question that are right."""
        return [[text for _, text in example["answers"]] for example in examples]

    def score(
        self, predicted: Sequence[str], examples: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        names = [example["id"] for example in examples]
        said, gold = (
            dict(zip(names, each, strict=True)) for each in (predicted, self.gold(examples))
        )
        return {**squad(said, gold), "n": float(len(gold))}


def best_spans(
    start: Tensor, end: Tensor, inside: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The spans of the largest start + end score, found among all of them.

    Args:
        start: float [batch, length], a score for each piece to be the first.
        end: float [batch, length], to be the last.
        inside: int64 [batch, 2], first and last piece that a span may hold.
        longest: The most pieces of a span.

    Returns:
        First pieces, last pieces (int64 [batch]) and scores (fp32 [batch]).
    """
    length = start.shape[1]
    place = torch.arange(length, device=start.device)
    distance = place[None, :] - place[:, None]
    allowed = (distance >= 0) & (distance < longest)
    scores = (start.float()[:, :, None] + end.float()[:, None, :]).masked_fill_(
        ~allowed, -torch.inf
    )
    outside = (place < inside[:, :1]) | (place > inside[:, 1:])
    scores.masked_fill_(outside[:, :, None] | outside[:, None, :], -torch.inf)
    value, place_of_both = scores.flatten(1).max(1)
    return place_of_both // length, place_of_both % length, value


def _answers(given: Any) -> list[tuple[int, str]] | None:
    """(start, text) of each answer, as this function gave them too; None if they are malformed."""
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
    elif all(isinstance(answer, tuple) and len(answer) == 2 for answer in given):
        starts, texts = [s for s, _ in given], [t for _, t in given]
    else:
        rows = [answer if isinstance(answer, dict) else {} for answer in given]
        texts = [row.get("text") for row in rows]
        starts = [row.get("answer_start") for row in rows]
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    pairs = list(zip(starts, texts, strict=True))
    return (
        pairs if all(type(s) is int and s >= 0 and isinstance(t, str) for s, t in pairs) else None
    )


def _span(
    offsets: Sequence[tuple[int, int]], text: Sequence[int], start: int, answer: str
) -> tuple[int, int]:
    """First and last piece of an answer; 0, 0 where the window does not hold all of it."""
    end = start + len(answer)
    if offsets[text[0]][0] > start or offsets[text[-1]][1] < end:
        return 0, 0
    held = [p for p in text if offsets[p][1] > start and offsets[p][0] < end]
    return (held[0], held[-1]) if held else (0, 0)
