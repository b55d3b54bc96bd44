"""Token classification: part-of-speech tags, named entities, slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
from .data import DataError, Examples, source_of, where
from .metrics import SCHEMES, accuracy, entity_f1, not_iob

__all__ = ["UPOS", "TokenClassification"]

UPOS = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN"),
    *("PUNCT", "SCONJ", "SYM", "VERB", "X"),
)
"""The universal parts of speech: what a tagger of them tells apart, seen in training or not."""


@register
@dataclass(frozen=True)
class TokenClassification(Task):
    """One label a word, on its first piece.

    A sentence too long for the model is read in windows that overlap by up to a quarter; each word
    is trained and scored once, in the window where it has more context. A word of which the
    tokenizer leaves nothing is read as the unknown piece.

    Attributes:
        metric: "f1" of entities (labels such as B-PER), or "accuracy" of words.
        scheme: How entities are counted; see `metrics.entity_f1`.
        tokens: The field that holds the words.
        tags: The field that holds the labels: "tags" of CoNLL files, "upos" of CoNLL-U.
        outside: Types of entities that count as none: the paper's ("DATE", "MISC") are those that
            one of CoNLL 2003 and MasakhaNER has and the other lacks (LT-SFT, §4.3, footnote 3).
        unlabelled: Labels of words that are read as context alone, neither learnt nor scored, such
            as ("X",) where X says that a word's part of speech is not known. An entity ends there.
    """

    name: ClassVar[str] = "tokens"
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    words: ClassVar[bool] = True
    plain: ClassVar[str] = "conll"
    fills: ClassVar[dict[str, int]] = {"labels": -100}

    metric: str = "f1"
    scheme: str | None = None
    tokens: str = "tokens"
    tags: str = "tags"
    outside: Sequence[str] = ()
    unlabelled: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.metric not in ("f1", "accuracy"):
            raise ValueError(f'metric is {self.metric!r}; tokens have "f1" and "accuracy"')
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise ValueError(
                f"scheme is {self.scheme!r}; it must be one of {', '.join(SCHEMES)}, or none"
            )
        for name, such in (("outside", 'types, such as ["DATE"]'), ("unlabelled", 'labels: ["X"]')):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(x, str) for x in given):
                raise ValueError(f"{name} is {given!r}; it must be a list of {such}")
            object.__setattr__(self, name, tuple(given))  # JSON gives a list

    def checked(self, examples: Examples) -> Examples:
        rows = []
        for i, row in enumerate(examples):
            words = field(examples, i, self.tokens, list)
            tags = field(examples, i, self.tags, list)
            if self.tags == "upos" and len(words) == len(tags) and "_" in tags:
                # Of a contraction, `datasets` gives the whole as a row before its words.
                kept = [i for i, tag in enumerate(tags) if tag != "_"]
                words, tags = [words[i] for i in kept], [tags[i] for i in kept]
            if not words or len(words) != len(tags):
                raise DataError(f"{examples.where(i)}: {len(words)} words and {len(tags)} labels")
            for values in (words, tags):
                for value in values:
                    if not isinstance(value, str) or not value:
                        raise DataError(
                            f"{examples.where(i)}: words and labels must be text, found {value!r}"
                        )
            tags = ["O" if tag[2:] in self.outside else tag for tag in tags]
            rows.append({**row, self.tokens: words, self.tags: tags})
        return examples.replaced(rows)

    def labels(self, examples: Sequence[dict[str, Any]]) -> list[str]:
        found = {tag for example in examples for tag in example[self.tags]}
        if self.tags == "upos":
            found |= {*UPOS}
        found -= {*self.unlabelled}
        if self.metric == "f1":
            self._check_prefixes(found, source_of(examples))
        if len(found) < 2:
            raise DataError(f"{source_of(examples)}: has one label, {found}; two are needed")
        return sorted(found)

    def _check_prefixes(self, labels: set[str], source: str) -> None:
        if wrong := sorted(label for label in labels if label != "O" and label[1:2] != "-"):
            raise DataError(
                f"{source}: the label {wrong[0]!r} is not of an entity (O, B-PER, I-PER, …); for "
                'words without entities, the metric is "accuracy"'
            )
        if self.scheme is None and (other := not_iob(labels)):
            raise DataError(f"{source}: {other}")

    def encode(
        self,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        max_length: int,
        *,
        labels: Sequence[str] | None = None,
    ) -> Features:
        ids = label_ids(labels)
        room = check_length(tokenizer, max_length)
        reader = Words(tokenizer)
        features = []
        for i, example in enumerate(examples):
            for tag in example[self.tags]:
                if tag not in ids and tag not in self.unlabelled:
                    hint = f'; outside=["{tag[2:]}"] counts it as none' if tag[1:2] == "-" else ""
                    raise unknown_label(examples, i, tag, labels, hint)
            words, counts = reader.readable(example[self.tokens], where(examples, i))
            for start, end, first, last in windows(counts, room):
                encoding = reader.encode(words[start:end], max_length)
                positions = first_pieces(encoding.word_ids())
                targets = [-100] * len(encoding["input_ids"])
                tags = example[self.tags]
                labelled = [w for w in range(first, last) if tags[w] not in self.unlabelled]
                for word in labelled:
                    targets[positions[word - start]] = ids[tags[word]]
                if labelled:  # the mean loss over no word would be NaN
                    features.append(
                        {**for_model(encoding), "labels": targets, "example": i, "words": labelled}
                    )
        if not features:
            some = "word with a label" if len(examples) else "sentence"
            raise DataError(f"{source_of(examples)}: holds no {some}")
        return features

    def predict(
        self,
        model: nn.Module,
        features: Features,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        batch_size: int = 32,
    ) -> list[list[str]]:
        """The label that a model gives to each word of each example, "" where the word's own is
        unlabelled; arguments as of `evaluate`."""
        names = head_labels(model)
        device = next(model.parameters()).device
        predicted = [[""] * len(example[self.tokens]) for example in examples]
        with evaluating(model):
            for chosen, batch in batches(features, self.collate(tokenizer), batch_size, device):
                wanted = batch.pop("labels") != -100
                classes = model(**batch).logits.argmax(-1)
                for i, row, positions in zip(
                    chosen, classes.tolist(), wanted.tolist(), strict=True
                ):
                    said = [names[c] for c, here in zip(row, positions, strict=True) if here]
                    feature = features[i]
                    for word, label in zip(feature["words"], said, strict=True):
                        predicted[feature["example"]][word] = label
        return predicted

    def gold(self, examples: Sequence[dict[str, Any]]) -> list[list[str]]:
        return [
            ["" if tag in self.unlabelled else tag for tag in example[self.tags]]
            for example in examples
        ]

    def score(
        self, predicted: Sequence[Sequence[str]], examples: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        gold = self.gold(examples)
        flat = [
            pair
            for tags in zip(predicted, gold, strict=True)
            for pair in zip(*tags, strict=True)
            if pair[1]
        ]
        scores = {"accuracy": accuracy([said for said, _ in flat], [true for _, true in flat])}
        if self.metric == "f1":
            self._check_prefixes({true for _, true in flat}, source_of(examples))
            guess, truth = ([[t or "O" for t in row] for row in rows] for rows in (predicted, gold))
            scores |= entity_f1(guess, truth, self.scheme)
        return {**scores, "n": float(len(flat))}


class Words:
    """Tokenizes words that are words already, each as it would be inside a text.

    A tokenizer over bytes takes "cat" for the beginning of a text unless a space is before it; so
    that a model sees what it was trained on, one is put there.

    Args:
        tokenizer: A fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.space = ""
        second = self._ids("a a")[len(self._ids("a")) :]
        if second != self._ids(["a"]) and second == self._ids([" a"]):
            self.space = " "

    def _ids(self, text: str | list[str]) -> list[int]:
        split = isinstance(text, list)
        found = self.tokenizer(text, is_split_into_words=split, add_special_tokens=False)
        ids: list[int] = found["input_ids"]
        return ids

    def readable(self, words: Sequence[str], at: str) -> tuple[list[str], list[int]]:
        """The words as `encode` takes them, and the pieces of each; one of which the tokenizer
        leaves nothing becomes the unknown piece.

        Raises:
            DataError: It leaves nothing of a word and has no unknown piece; it begins with `at`.
        """
        readable = [self.space + word for word in words]
        counts = self._counts(readable)
        if 0 in counts and (unknown := self.tokenizer.unk_token) is not None:
            readable = [w if n else unknown for w, n in zip(readable, counts, strict=True)]
            counts = self._counts(readable)
        if 0 in counts:
            raise DataError(f"{at}: the tokenizer leaves nothing of {words[counts.index(0)]!r}")
        return readable, counts

    def _counts(self, words: list[str]) -> list[int]:
        encoding = self.tokenizer(
            words, is_split_into_words=True, add_special_tokens=False, verbose=False
        )
        counts = [0] * len(words)
        for word in encoding.word_ids():
            counts[word] += 1
        return counts

    def encode(self, words: list[str], max_length: int) -> Any:
        """An encoding of readable words, special pieces included, cut off at max_length."""
        return self.tokenizer(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            verbose=False,
        )


def first_pieces(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Word → the position of its first piece."""
    first: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, position)
    return first


def windows(counts: Sequence[int], room: int) -> list[tuple[int, int, int, int]]:
    """Covers words by windows of at most `room` pieces that overlap by up to a quarter.

    Args:
        counts: Pieces of each word; one of more than `room` is cut off.
        room: Pieces of a window.

    Returns:
        (start, end, first, last): the words that a window holds, and among them those that it
        answers for. Every word has one window that does.
    """
    counts = [min(count, room) for count in counts]
    spans: list[tuple[int, int]] = []
    start = end = 0
    while end < len(counts):
        used = sum(counts[start:end])
        if used + counts[end] > room:
            start += 1  # the overlap leaves no room for the next word
            continue
        while end < len(counts) and used + counts[end] <= room:
            used += counts[end]
            end += 1
        spans.append((start, end))
        overlap = 0
        start = end
        while start > spans[-1][0] + 1 and overlap + counts[start - 1] <= room // 4:
            start -= 1
            overlap += counts[start]
    cuts = [0, *((a[1] + b[0]) // 2 for a, b in pairwise(spans)), len(counts)]
    return [(*span, *cut) for span, cut in zip(spans, pairwise(cuts), strict=True)]
