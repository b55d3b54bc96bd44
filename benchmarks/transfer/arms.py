"""What is compared: ways to choose the entries of an SFT, and ways to put SFTs together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_ft.tasks.recipes import Recipe

FULL = "full"
BIAS = "bias"
RANDOM = "random"
DENSE = "dense"
DENOISED = "denoised"

METHODS: dict[str, Mapping[str, Any]] = {
    "lt": {},
    RANDOM: {"criterion": "random"},
    DENOISED: {"criterion": "denoised"},
    BIAS: {"criterion": "bias"},
    FULL: {"full": True},
}
"""Method → what it changes of a recipe. "lt" is LT-SFT, "denoised" DeFT-X, "bias" BitFit."""

ALONE = (FULL, BIAS)
"""Methods that are no part of LT-SFT."""
SHARING = ("lt", DENOISED)
"""Methods that choose from a fully tuned model: with the same data below, they share it."""


def by_method(recipe: Recipe, method: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe as a method has it.

    Args:
        recipe: That of "lt".
        method: One of `METHODS`.
        options: Of its criterion.

    Returns:
        The recipe. Full tuning and BitFit have one phase, which gets the passes of both; "random"
        has the sparse phase of "lt", to tell what the selection does (LT-SFT, §4.1).
    """
    changes = dict(METHODS[method])
    if method in ALONE:
        length = "steps" if recipe.epochs is None else "epochs"
        changes[length] = sum(getattr(recipe, length))
        for limit in ("min_steps", "max_steps"):  # of each phase
            if (steps := getattr(recipe, limit)) is not None:
                changes[limit] = 2 * steps
    if method == FULL and isinstance(recipe.lr, tuple):
        # All entries move, as in the full phase; the sparse one's rate is for few.
        changes["lr"] = recipe.lr[0]
    return recipe.changed(**changes, **({"criterion_options": options} if options else {}))


@dataclass(frozen=True)
class Arm:
    """A row of the table: whose SFTs are put on the base model, and how.

    Attributes:
        name: Of the row.
        about: What it is, for the page.
        task: Method of the task's SFT, and of the source language's, on which it is trained.
        language: Method of the language's SFT; "dense": the fully tuned model of "lt" minus the
            base; None: there is none.
        whose: Language of the language's SFT: the "own" of the test data, that of an "other"
            target, or the "source" language, on whose SFT the task was learnt.
        weighted: The language's SFT has the weight that was chosen on development languages.
        rule: Rule of `sparse_ft.merge` by which the two become one, in place of their sum.
        options: Of the rule.
    """

    name: str
    about: str
    task: str = "lt"
    language: str | None = None
    whose: str = "own"
    weighted: bool = False
    rule: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("task-only", "task SFT alone"),
        Arm("composed", "task SFT + language SFT", language="lt"),
        Arm("wrong-language", "task SFT + another language's SFT", language="lt", whose="other"),
        Arm(
            "source-language", "task SFT + the source language's SFT", language="lt", whose="source"
        ),
        Arm("random-task-only", "RAND-SFT of the task alone", task=RANDOM),
        Arm("random", "RAND-SFT: both masks at random", task=RANDOM, language=RANDOM),
        Arm("denoised-task-only", "DeFT-X of the task alone", task=DENOISED),
        Arm("denoised", "DeFT-X: both masks denoised", task=DENOISED, language=DENOISED),
        Arm("dense-language", "task SFT + dense language vector", language=DENSE),
        Arm("weighted", "task SFT + weighted language SFT", language="lt", weighted=True),
        Arm("ties", "both merged by TIES", language="lt", rule="ties"),
        Arm("bitfit", "BitFit: the biases alone", task=BIAS, language=BIAS),
        Arm("full-tuning", "plain fine-tuning on the task", task=FULL),
    )
}
"""The rows, by name, in the order of the table."""
