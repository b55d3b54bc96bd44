"""What each test example adds to a score, and how far apart two arms are.

Every metric here is a function of sums over examples, so that a score on resampled data needs no
second evaluation: an example is a short row of counts, a draw a weight for each row. What is drawn
together (a message in all languages, the expansions of one template) is one group. Test data are
drawn from many groups; seeds are too few to draw from (`compared`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

METRICS = ("accuracy", "f1", "las", "uas")
DRAWS = 10_000
LEVEL = 0.95
# Draws that are weighed at once: what is in memory is one weight for each of them and group.
_AT_ONCE = 500


class Difference(NamedTuple):
    """How much better one arm is than another.

    Args:
        mean: On the data as they are, mean over the seeds; shares of 1.
        low: Lower end of the 95 % interval.
        high: Its upper end.
        seeds: How many the interval knows of; of one, it holds for that run alone.
    """

    mean: float
    low: float
    high: float
    seeds: int


def counts(
    metric: str,
    gold: Sequence[Any],
    predicted: Sequence[Any],
    labels: Sequence[str] | None = None,
    ignore: Collection[str] = (),
) -> np.ndarray:
    """What each example adds to a score; `value` of the sum over examples is the score.

    Args:
        metric: "accuracy"; "f1", which is macro F1 where an example has one label and that of
            entities where it has a tag for each word; "las" or "uas".
        gold: An example each: a label, a list of tags, or a list of (head, relation).
        predicted: Likewise, as `evaluate(predictions=True)` gives them.
        labels: All labels, for macro F1 alone.
        ignore: Words with these gold tags or relations do not count.

    Returns:
        [examples, m] int64: right and all; for "f1" found, said and there, for each label or once
        for all entities.

    Raises:
        ValueError: An unknown metric, another number of predictions than of examples or words, or
            a label that is not among `labels`.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")
    if len(gold) != len(predicted) or not len(gold):
        raise ValueError(f"counts: {len(gold)} examples, {len(predicted)} predictions")
    if isinstance(gold[0], str):
        if metric == "f1":
            return _by_label(gold, predicted, labels)
        gold, predicted = [[g] for g in gold], [[p] for p in predicted]
    rows = []
    for i, (truth, said) in enumerate(zip(gold, predicted, strict=True)):
        if len(truth) != len(said):
            raise ValueError(f"counts: example {i} has {len(truth)} words, {len(said)} predicted")
        counted = [_tag(t) not in ignore for t in truth]
        if metric == "f1":  # an entity ends at a word that does not count
            there, found = (
                _entities([tag if here else "O" for tag, here in zip(tags, counted, strict=True)])
                for tags in (truth, said)
            )
            rows.append([len(there & found), len(found), len(there)])
        else:
            pairs = [pair for *pair, here in zip(truth, said, counted, strict=True) if here]
            rows.append([sum(_same(metric, t, s) for t, s in pairs), len(pairs)])
    return np.asarray(rows, np.int64)


def _tag(word: Any) -> str:
    """A word's tag, or its relation."""
    return str(word if isinstance(word, str) else word[1])


def _same(metric: str, gold: Any, predicted: Any) -> bool:
    if metric == "uas":
        return bool(gold[0] == predicted[0])
    return gold == predicted if isinstance(gold, str) else tuple(gold) == tuple(predicted)


def _entities(tags: list[str]) -> set[tuple[str, int, int]]:
    from seqeval.metrics.sequence_labeling import get_entities

    return set(get_entities(tags))


def _by_label(
    gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str] | None
) -> np.ndarray:
    if labels is None:
        raise ValueError("counts: macro F1 needs the labels")
    place = {label: i for i, label in enumerate(labels)}
    if unknown := sorted({*gold, *predicted} - {*place}):
        raise ValueError(f"counts: {unknown[0]!r} is not among the labels {', '.join(labels)}")
    out = np.zeros((len(gold), len(labels), 3), np.int64)
    for i, (truth, said) in enumerate(zip(gold, predicted, strict=True)):
        out[i, place[said], 1] += 1
        out[i, place[truth], 2] += 1
        out[i, place[truth], 0] += truth == said
    return out.reshape(len(gold), -1)


def value(metric: str, totals: np.ndarray) -> np.ndarray:
    """A score of sums over examples.

    Args:
        metric: As for `counts`.
        totals: [..., m] sums of its rows, weighted or not.

    Returns:
        [...] shares of 1: right / all, or the mean over the labels that occur, as gold or as
        prediction, of F1 = 2·found / (said + there); 0 where nothing occurs.
    """
    totals = np.asarray(totals, np.float64)
    if metric != "f1":
        return _ratio(totals[..., 0], totals[..., 1])
    each = totals.reshape(*totals.shape[:-1], -1, 3)
    both = each[..., 1] + each[..., 2]
    return _ratio(_ratio(2 * each[..., 0], both).sum(-1), (both > 0).sum(-1))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    out = np.zeros(np.shape(above))
    np.divide(above, below, out=out, where=below > 0)
    return out


def commonest(gold: Sequence[Any], ignore: Collection[str] = ("",)) -> tuple[str, float]:
    """The most frequent label: what one gets right who has learnt nothing else.

    Args:
        gold: As for `counts`, of labels or tags.
        ignore: These do not count.

    Returns:
        The label and its share; of several, the first by name.
    """
    flat = [tag for one in gold for tag in ([one] if isinstance(one, str) else one)]
    found = Counter(tag for tag in flat if tag not in ignore)
    label = min(found, key=lambda tag: (-found[tag], tag))
    return label, found[label] / sum(found.values())


def group_ids(groups: Sequence[str]) -> list[str]:
    """Short names of groups, the same for the same text in every language and experiment.

    A stored line of the part "groups" has those of a language's test examples, so that intervals
    can be had from stored lines alone, which hold no text.

    Args:
        groups: A message key or template for each example.

    Returns:
        Eight hexadecimal digits for each.
    """
    return [hashlib.sha256(group.encode()).hexdigest()[:8] for group in groups]


def resampled(
    metric: str,
    runs: Sequence[np.ndarray],
    groups: Sequence[Sequence[str]],
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """Scores of several runs on data resampled with replacement, group by group.

    A draw takes as many groups as there are in all runs together, each with all of its examples,
    and the same ones for every run: paired, also across languages that share groups.

    Args:
        metric: As for `counts`.
        runs: What `counts` gave for each, [examples, m].
        groups: The group of each example of each run.
        draws: How many.
        seed: Of the draws.

    Returns:
        [1 + draws, runs]; row 0 is of the data as they are.

    Raises:
        ValueError: A run has not as many groups as examples.
    """
    tables = [np.asarray(run, np.int64) for run in runs]
    for table, names in zip(tables, groups, strict=True):
        if len(table) != len(names):
            raise ValueError(f"resampled: {len(table)} examples, but groups for {len(names)}")
    union = sorted({name for names in groups for name in names})
    place = {name: i for i, name in enumerate(union)}
    width = [table.shape[1] for table in tables]
    sums = np.zeros((len(union), sum(width)))
    for end, table, names in zip(np.cumsum(width), tables, groups, strict=True):
        at = np.asarray([place[name] for name in names])
        np.add.at(sums[:, end - table.shape[1] : end], at, table)
    out = np.empty((1 + draws, len(tables)))
    generator = np.random.PCG64(np.random.SeedSequence((seed, 0)))
    for start in range(0, 1 + draws, _AT_ONCE):
        weights = _weights(generator, min(_AT_ONCE, 1 + draws - start), len(union))
        if start == 0:
            weights[0] = 1
        # Sums of integers: exact, and so the same in whatever order they are added.
        totals = np.split(weights @ sums, np.cumsum(width)[:-1], axis=1)
        out[start : start + len(weights)] = np.stack([value(metric, t) for t in totals], axis=1)
    return out


def _picked(generator: np.random.PCG64, rows: int, n: int) -> np.ndarray:
    """[rows, n] numbers below n; of raw bits, the only stream that no version of numpy changes."""
    high = generator.random_raw(rows * n) >> np.uint64(32)
    return ((high * np.uint64(n)) >> np.uint64(32)).astype(np.int64).reshape(rows, n)


def _weights(generator: np.random.PCG64, rows: int, n: int) -> np.ndarray:
    """[rows, n] how often each of n is drawn in n draws with replacement."""
    flat = _picked(generator, rows, n) + n * np.arange(rows)[:, None]
    return np.bincount(flat.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


@lru_cache(maxsize=8)
def _student(draws: int, degrees: int, seed: int) -> np.ndarray:
    """[draws] of Student's t, by the polar method (Bailey, Mathematics of Computation 62, 1994)."""
    raw = np.random.PCG64(np.random.SeedSequence((seed, 1))).random_raw(2 * draws)
    u, v = ((raw >> np.uint64(11)) + 0.5).reshape(2, draws) / 2.0**53
    radius: np.ndarray = np.sqrt(degrees * (u ** (-2 / degrees) - 1))
    return radius * np.cos(2 * np.pi * v)


def compared(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Difference:
    """How much better one arm is than another, from the scores that `resampled` gave.

    The arms are paired: on the same draws, and run s of the one with run s of the other. A
    bootstrap of a few seeds cannot see how far others lie (of three, its 95 % interval is from the
    least to the largest, which covers 75 %). So a draw's mean over the seeds gets an error of its
    own, Student's t with seeds − 1 degrees of freedom times the standard error of the seeds'
    differences. That counts twice what depends on seed and data together: for wider intervals.

    Args:
        a: [1 + draws, seeds] of the one.
        b: Of the other.
        seed: Of the draws of the seeds' error.

    Returns:
        The mean of row 0, and the 2.5th and 97.5th percentiles of the draws.

    Raises:
        ValueError: The arms have not the same draws and seeds.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentiles);
    Koehn, EMNLP 2004 (paired).
    """
    if a.shape != b.shape:
        raise ValueError(f"compared: the arms have scores of shapes {a.shape} and {b.shape}")
    apart = a - b
    draws, seeds = len(apart) - 1, apart.shape[1]
    means = apart[1:].mean(1)
    if seeds > 1:
        error = apart[0].std(ddof=1) / seeds**0.5
        # The sign makes the other arm against this one the mirror image.
        error = np.copysign(error, apart[0].mean())
        means = means + error * _student(draws, seeds - 1, seed)
    low, high = np.percentile(means, (50 - 50 * LEVEL, 50 + 50 * LEVEL))
    return Difference(float(apart[0].mean()), float(low), float(high), seeds)


def difference(
    metric: str,
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    groups: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """How much better one arm is than another in one language.

    Args:
        metric: As for `counts`.
        a: What `counts` gave for the one, an array a seed.
        b: For the other, with the same seeds in the same order.
        groups: The group of each example.
        draws: How many.
        seed: Of the draws.

    Returns:
        The difference and its 95 % interval.

    Raises:
        ValueError: The arms have not the same seeds or examples.
    """
    return pooled(metric, {"": a}, {"": b}, {"": groups}, draws, seed)


def pooled(
    metric: str,
    a: Mapping[str, Sequence[np.ndarray]],
    b: Mapping[str, Sequence[np.ndarray]],
    groups: Mapping[str, Sequence[str]],
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """How much better one arm is than another in the mean over languages.

    The languages are those that there are; groups that several share are drawn together.

    Args:
        metric: As for `counts`.
        a: Language → what `counts` gave for the one arm, an array a seed.
        b: For the other, with the same seeds in the same order.
        groups: Language → the group of each example.
        draws: How many.
        seed: Of the draws.

    Returns:
        The difference of the means over languages and its 95 % interval.

    Raises:
        ValueError: The arms have not the same languages, seeds or examples.
    """
    seeds = {len(runs) for arm in (a, b) for runs in arm.values()}
    if a.keys() != b.keys() or len(seeds) != 1 or seeds == {0}:
        raise ValueError(
            f"pooled: the arms have the languages {sorted(a)} and {sorted(b)} with "
            f"{sorted(seeds)} seeds; both need the same"
        )
    runs = [run for arm in (a, b) for language in a for run in arm[language]]
    of_run = [groups[language] for arm in (a, b) for language in a for _ in arm[language]]
    scores = resampled(metric, runs, of_run, draws, seed)
    one, other = scores.reshape(1 + draws, 2, len(a), -1).mean(2).transpose(1, 0, 2)
    return compared(one, other, seed)
