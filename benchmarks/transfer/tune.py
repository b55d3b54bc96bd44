"""The knobs that papers leave open, tried on development languages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .run import Row

WEIGHTS = (0.5, 0.75, 1.0)
"""Of the language's SFT in a composition."""
KNOBS: tuple[Mapping[str, Any], ...] = (
    {"rank": "var:0.9"},
    {"rank": "var:0.8"},
    {"rank": "var:0.95"},
    {"rank": "var:0.9", "keep_high": 0.0},
    {"rank": "var:0.9", "keep_high": 0.2},
    {"rank": "var:0.9", "embeddings": True},
)
"""Of DeFT-X: around the first, one at a time."""


def candidates(seeds: Iterable[int], languages: Sequence[str]) -> list[Row]:
    """The rows to compare: the weights of LT-SFT's composition, and DeFT-X's knobs.

    Args:
        seeds: Of the runs.
        languages: Development languages.
    """
    return [
        row
        for seed in seeds
        for language in languages
        for row in (
            *(Row(seed, language, "composed", "tune", weight=weight) for weight in WEIGHTS),
            *(
                Row(seed, language, "denoised", "tune", options=tuple(sorted(options.items())))
                for options in KNOBS
            ),
        )
    ]


def chosen(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The means over languages and seeds, best first within each arm, a line each."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        knobs = line.get("options") or {"weight": line["weight"]}
        said = ", ".join(f"{name}={value}" for name, value in knobs.items())
        found.setdefault((line["arm"], said), []).append(line["score"])
    ranked = sorted(found, key=lambda key: (key[0], -sum(found[key]) / len(found[key])))
    return [
        f"{arm} {said}: {sum(scores) / len(scores):.4f} ({len(scores)} runs)"
        for arm, said in ranked
        for scores in [found[arm, said]]
    ]
