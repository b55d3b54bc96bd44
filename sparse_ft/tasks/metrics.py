"""Metrics of the tasks: shares between 0 and 1, never percentages.

Only `entity_f1` needs a package (seqeval); the rest is written out here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["accuracy", "attachment", "entity_f1", "macro_f1", "squad"]

Tags = Sequence[Sequence[str]]

SCHEMES = ("IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")


def accuracy(predicted: Sequence[object], gold: Sequence[object]) -> float:
    """Share of the items that are predicted as they are.

    Raises:
        ValueError: There are no items, or not as many predictions as items.
    """
    _check("accuracy", predicted, gold)
    return sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)


def macro_f1(
    predicted: Sequence[str], gold: Sequence[str], labels: Sequence[str] | None = None
) -> float:
    """Mean over the labels of F1 = 2·TP / (2·TP + FP + FN), 0 where a label never occurs.

    Args:
        predicted: One label an item.
        gold: One label an item.
        labels: The labels that count; default: those that occur among either.

    Raises:
        ValueError: There are no items, or not as many predictions as items.
    """
    _check("macro_f1", predicted, gold)
    right = Counter(g for p, g in zip(predicted, gold, strict=True) if p == g)
    both = Counter(predicted) + Counter(gold)  # 2·TP + FP + FN
    labels = sorted(both) if labels is None else labels
    return sum(2 * right[label] / max(1, both[label]) for label in labels) / len(labels)


def entity_f1(predicted: Tags, gold: Tags, scheme: str | None = None) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of entities, as the package seqeval counts them.

    Args:
        predicted: Tags such as "B-PER", "I-PER", "O": a list a sentence.
        gold: The same.
        scheme: None is for tags B-, I- and O, and counts as the script conlleval of CoNLL-2003
            does, which most published figures follow; IOB1, IOB2, IOE1, IOE2, IOBES or BILOU counts
            only entities that are well formed in that scheme.

    Returns:
        {"precision", "recall", "f1"}; 0 where there is nothing to take a share of.

    Raises:
        ValueError: Lengths differ, there is no sentence, the scheme is unknown, or it is None and
            there are other tags.
    """
    _check("entity_f1", predicted, gold)
    for i, (p, g) in enumerate(zip(predicted, gold, strict=True)):
        if len(p) != len(g):
            raise ValueError(f"entity_f1: sentence {i} has {len(g)} tags, {len(p)} predicted")
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"entity_f1: scheme is {scheme!r}; it must be one of {', '.join(SCHEMES)}")
    if scheme is None and (wrong := not_iob(tag for s in (*gold, *predicted) for tag in s)):
        raise ValueError(f"entity_f1: {wrong}")
    try:
        from seqeval import metrics
        from seqeval import scheme as schemes
    except ModuleNotFoundError as error:
        if error.name != "seqeval":
            raise
        raise ModuleNotFoundError(
            'entity_f1 needs the package seqeval (pip install "sparse-ft[tasks]")', name="seqeval"
        ) from None
    options: dict[str, Any] = {"average": "micro", "zero_division": 0}
    if scheme is not None:
        options |= {"mode": "strict", "scheme": getattr(schemes, scheme)}
    truth, guess = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    return {
        "precision": float(metrics.precision_score(truth, guess, **options)),
        "recall": float(metrics.recall_score(truth, guess, **options)),
        "f1": float(metrics.f1_score(truth, guess, **options)),
    }


def not_iob(tags: Iterable[str]) -> str | None:
    """What is to be said where tags are of another scheme than IOB1 and IOB2; None where not."""
    other = sorted({tag for tag in tags if tag[:1] not in ("B", "I", "O")})
    if not other:
        return None
    return (
        f"the tag {other[0]!r} is not of B-, I- and O, so the scheme must be named: IOBES (also "
        "called BIOES), BILOU, IOE1 or IOE2"
    )


def squad(predicted: Mapping[str, str], gold: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of answers, as SQuAD v1.1 scores them (Rajpurkar et al., EMNLP 2016).

    Both sides are lower-cased and lose punctuation, the articles a, an, the, and surplus spaces. A
    question scores the maximum over its gold answers; one without a prediction scores 0.

    Args:
        predicted: The answer by question id.
        gold: All correct answers by question id.

    Returns:
        {"exact_match", "f1"}, means over the questions of `gold`.

    Raises:
        ValueError: There is no question, or one has no gold answer.
    """
    if not gold:
        raise ValueError("squad: there are no questions")
    exact = overlap = 0.0
    for name, answers in gold.items():
        if not answers:
            raise ValueError(f"squad: question {name!r} has no correct answer")
        guess = _normalised(predicted.get(name, ""))
        truths = [_normalised(answer) for answer in answers]
        if name in predicted:
            exact += max(float(guess == truth) for truth in truths)
            overlap += max(_token_f1(guess.split(), truth.split()) for truth in truths)
    return {"exact_match": exact / len(gold), "f1": overlap / len(gold)}


def _normalised(answer: str) -> str:
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def attachment(
    heads: Sequence[Sequence[int]],
    relations: Tags,
    gold_heads: Sequence[Sequence[int]],
    gold_relations: Tags,
    counted: Sequence[Sequence[bool]] | None = None,
) -> dict[str, float]:
    """Attachment scores of dependency trees over all words of all sentences.

    Args:
        heads: Predicted head of each word, a list a sentence; 0 is the root.
        relations: Predicted relation of each word.
        gold_heads: The treebank's.
        gold_relations: The treebank's.
        counted: Which words count; default: all.

    Returns:
        {"uas": share of words with the right head, "las": with the right head and relation}.

    Raises:
        ValueError: Lengths differ, or no word counts.
    """
    _check("attachment", heads, gold_heads)
    words = head = both = 0
    for i, columns in enumerate(zip(heads, relations, gold_heads, gold_relations, strict=True)):
        if len({len(column) for column in columns}) > 1:
            raise ValueError(
                f"attachment: sentence {i} has {len(columns[2])} words, {len(columns[0])} predicted"
            )
        for j, (h, r, gold_h, gold_r) in enumerate(zip(*columns, strict=True)):
            if counted is None or counted[i][j]:
                words += 1
                head += h == gold_h
                both += h == gold_h and r == gold_r
    if not words:
        raise ValueError("attachment: no word counts")
    return {"uas": head / words, "las": both / words}


def _check(what: str, predicted: Sequence[object], gold: Sequence[object]) -> None:
    if len(predicted) != len(gold):
        raise ValueError(f"{what}: {len(gold)} items, but {len(predicted)} predictions")
    if not gold:
        raise ValueError(f"{what}: there is nothing to score")
