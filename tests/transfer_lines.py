"""Made-up lines of the transfer benchmark, with scores of a known distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.transfer import scores

SETTINGS = {
    "base": "a base", "recipes": {}, "device": "Some CPU", "threads": 2, "precision": "bf16",
    "versions": {"torch": "2.13.0", "python": "3.11.7"},
}  # fmt: skip
RIGHT: dict[str, float] = {
    "task-only": 0.65, "composed": 0.69, "wrong-language": 0.645, "random": 0.66, "denoised": 0.692,
}  # fmt: skip


def line(part: str, language: str | None, seed: int | None, **more: Any) -> dict[str, Any]:
    """What all lines have."""
    return {
        "schema": 1, "kind": "transfer", "experiment": "pos", "size": "quick", "part": part,
        "language": language, "seed": seed, "metric": "accuracy", "settings": SETTINGS,
        "data": {"content": "0123456789abcdef", "packages": {"a-package": "1.0"}},
        "date": "2026-01-02T03:04:05Z", **more,
    }  # fmt: skip


def scored(table: np.ndarray) -> float:
    """The accuracy of counts."""
    return float(scores.value("accuracy", table.sum(0)))


def arms(
    languages: Sequence[str] = ("frp", "an"),
    seeds: int = 3,
    right: Mapping[str, float] = RIGHT,
    n: int = 200,
    views: Sequence[str] = (),
    **more: Any,
) -> list[dict[str, Any]]:
    """Lines of arms with a share of right words, each example a group that languages share."""
    found = []
    for language in languages:
        # All arms get the same words right but for those by which they differ.
        rng = np.random.default_rng(list(language.encode()))
        lengths = rng.integers(4, 20, n)
        ease = [rng.random(k) for k in lengths]
        noise = {seed: [rng.normal(0, 0.02, k) for k in lengths] for seed in range(seeds)}
        for arm, share in right.items():
            for seed in range(seeds):
                table = np.array(
                    [
                        [(e + z < share).sum(), len(e)]
                        for e, z in zip(ease, noise[seed], strict=True)
                    ]
                )
                half = np.stack([table[:, 0] // 2, table[:, 1] // 2], 1)
                found.append(
                    line(
                        "arms", language, seed, arm=arm, counts=table.tolist(), n=n,
                        score=scored(table), seconds=10.0, views=dict.fromkeys(views, scored(half)),
                        view_counts=dict.fromkeys(views, half.tolist()), **more,
                    )
                )  # fmt: skip
        groups = scores.group_ids([f"key-{i}" for i in range(n)])
        found.append(line("groups", language, None, groups=groups, **more))
    return found


def ladder(languages: Sequence[str] = ("frp", "an")) -> list[dict[str, Any]]:
    """Scores that rise with the density."""
    return [
        line("ladder", x, seed, arm=arm, of=of, density=density,
             score=0.6 + at + density + seed / 100)
        for x in languages
        for seed in (0, 1)
        for arm, of, at in (
            ("task-only", "task", 0.0), ("composed", "task", 0.02), ("composed", "both", 0.03)
        )
        for density in (0.0025, 0.01, 0.08)
    ]  # fmt: skip


def grid(languages: Sequence[str] = ("frp",)) -> list[dict[str, Any]]:
    """Scores that are highest where the densities are 0.08 and 0.3."""
    return [
        line("grid", x, 0, arm="composed", task_density=task, language_density=of_language,
             score=0.7 - abs(task - 0.08) - 0.1 * abs(of_language - 0.3))
        for x in languages
        for task in (0.02, 0.08, 0.3)
        for of_language in (0.02, 0.08, 0.3)
    ]  # fmt: skip


def overlap(names: Sequence[str] = ("frp", "an", "en", "task")) -> list[dict[str, Any]]:
    """Pairs that share a tenth more with each name that comes later."""
    return [
        line("overlap", None, 0, first=a, second=b, shared=100 * (j + 1), entries=[1000, 2000])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    ]
