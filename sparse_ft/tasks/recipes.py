"""The published recipes as named presets: K, lengths, L1, schedule, batch, how the best is chosen.

"paper" is Ansell et al., ACL 2022, §4.2, §4.3 and footnotes 5 and 6; "scripts" are those of its
reference implementation, cambridgeltl/composable-sft. DeFT-X (Simon & Jyothi, EMNLP Findings 2025)
publishes no code, and its hyper-parameters are not known to us: its presets are "inferred".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..loop import Length

__all__ = ["K_LADDER", "LANGUAGE_K", "RECIPES", "Recipe", "RecipeError", "recipe"]

K_LADDER = {factor: 12 * 2 * 768 * 768 // factor for factor in (32, 16, 8, 4, 2, 1)}
"""K by the reduction factor of adapters that have as many parameters, for a base of 12 layers of
width 768 (paper, footnote 5): 442,368 for 32, up to 14,155,776 for 1."""
LANGUAGE_K = K_LADDER[2] + 768 * 768
"""7,667,712: adapters of reduction factor 2 and an invertible one (paper, §4.2)."""


class RecipeError(ValueError):
    """There is no such preset, or a setting of it is out of range."""


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run is set to, but its data and its base model.

    Attributes:
        name: The preset's.
        task: The kind of training: "mlm", "clm", "tokens", "sequences", "qa" or "parsing".
        origin: "paper", "scripts" (of the reference implementation), "inferred" (not published) or
            "ours".
        about: What it was used for, in a few words.
        unstated: Names of settings that its origin leaves open, and that are ours.
        k: Number of entries to tune; or density. Both None for a criterion that fixes its entries,
            such as "bias".
        density: Share of the eligible entries to tune, in (0, 1].
        full: Plain fine-tuning, to compare with: every entry, the norms too, in one phase without
            selection and L1 term.
        criterion: A criterion of `sparse_ft.select`, by name.
        criterion_options: Its options, such as rank for "denoised".
        fill: Where fewer than K entries moved, fill up with others, in their order, in place of an
            error.
        iterations: Rounds of full tuning, selection, rewinding and sparse tuning.
        l1: λ of the full and of the sparse phase.
        epochs: Of the full and of the sparse phase; or steps.
        steps: Optimizer steps of the full and of the sparse phase.
        min_steps: Fewest optimizer steps of a phase, whatever the epochs come to.
        max_steps: Most of them.
        batch_size: Examples in a batch.
        accumulate: Batches for one optimizer step.
        max_length: Most pieces of an example (a block, a window), special ones included.
        lr: Learning rate at the start; or one of the full and one of the sparse phase.
        schedule: "linear" (to 0), "cosine" or "constant".
        warmup: Share of the steps over which the rate rises, in [0, 1).
        weight_decay: Decoupled decay of AdamW.
        max_grad_norm: Norm to clip gradients to; 0 clips none.
        metric: The figure that the best state is chosen by; None: the task's own.
        evaluate_every: Optimizer steps from one evaluation to the next, or "epoch"; None: none, and
            the last state counts.
        held_out: Share of the text that is held out for it, where no file is.
        freeze_norms: Are the norms frozen?
        decouple: Are the output embeddings decoupled from the input embeddings, and frozen?
        precision: "bf16" or "fp16" for autocast; None for the weights' own.
        options: Of the task, such as tags="upos"; see `sparse_ft.tasks`.
    """

    name: str
    task: str
    origin: str
    about: str
    unstated: tuple[str, ...] = ()
    k: int | None = None
    density: float | None = None
    full: bool = False
    criterion: str = "magnitude"
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    fill: bool = False
    iterations: int = 1
    l1: tuple[float, float] = (0.0, 0.0)
    epochs: tuple[float, float] | None = None
    steps: tuple[int, int] | None = None
    min_steps: int | None = None
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 256
    lr: float | tuple[float, float] = 5e-5
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    metric: str | None = None
    evaluate_every: int | str | None = None
    held_out: float | None = None
    freeze_norms: bool = True
    decouple: bool = False
    precision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def role(self) -> str:
        """What its SFTs are for: "language" or "task"."""
        return "language" if self.task in ("mlm", "clm") else "task"

    def changed(self, **settings: Any) -> Recipe:
        """This recipe with other settings.

        What is given takes the place of what it excludes: a density that of k, a length that of
        one in another unit and of its limits, a criterion the options of the one before, and
        `full` all that sparse tuning has.

        Raises:
            RecipeError: There is no such setting, or it is out of range.
        """
        for name in settings:
            if name not in SETTINGS:
                raise RecipeError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
        given = {name for name, value in settings.items() if value is not None}
        criterion = settings.get("criterion", self.criterion)
        if settings.get("full") is True:
            settings = {**_FULL, **settings}
        elif "criterion" in given and criterion != self.criterion:
            settings = {"criterion_options": {}, **settings}
        if _fixes(criterion):
            settings = {"k": None, "density": None, **settings}
        for one, other in (("k", "density"), ("steps", "epochs")):
            if {one, other} <= given:
                raise RecipeError(f"give {one} or {other}, not both")
            if here := given & {one, other}:
                settings.setdefault(other if here == {one} else one, None)
        if given & {"steps", "epochs"}:
            settings = {"min_steps": None, "max_steps": None, **settings}
        settings = {name: _checked(name, value) for name, value in settings.items()}
        changed = replace(self, **settings)
        if changed.epochs is None and changed.steps is None:
            raise RecipeError("a length is needed: epochs or steps")
        if changed.full and (wrong := [n for n in _FULL if getattr(changed, n) != _FULL[n]]):
            raise RecipeError(f"full tunes every entry, without {wrong[0]}; leave that out")
        if _fixes(changed.criterion) and (changed.k or changed.density):
            raise RecipeError(
                f"criterion {changed.criterion!r} fixes its entries; give neither k nor density"
            )
        if not (changed.full or changed.k or changed.density or _fixes(changed.criterion)):
            raise RecipeError("k or density is needed; full=true tunes every entry")
        low, high = changed.min_steps, changed.max_steps
        if low is not None and high is not None and low > high:
            raise RecipeError(f"min_steps ({low:,}) is beyond max_steps ({high:,})")
        return changed

    def lengths(self) -> tuple[Length, Length]:
        """The lengths of the full and of the sparse phase."""
        from ..loop import Length

        if self.steps is not None:
            full, sparse = (Length(steps=n) for n in self.steps)
        else:
            assert self.epochs is not None
            full, sparse = (
                Length(epochs=n, min_steps=self.min_steps, max_steps=self.max_steps)
                for n in self.epochs
            )
        return full, sparse

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, for metadata; those that are unset left out.

        Where some are not those of the preset, "changed" names them.
        """
        preset = RECIPES.get(self.name, self)
        changed = [name for name in SETTINGS if getattr(self, name) != getattr(preset, name)]
        found: dict[str, Any] = {"preset": self.name, "origin": self.origin}
        found |= {"changed": changed} if changed else {}
        for name in SETTINGS:
            value = getattr(self, name)
            if (self.full and name in _SPARSE) or value in (None, {}, ()):
                continue
            found[name] = list(value) if isinstance(value, tuple) else value
        return found


SETTINGS = tuple(
    f.name for f in fields(Recipe) if f.name not in ("name", "task", "origin", "about", "unstated")
)
"""The settings of a recipe that may be changed."""
_SPARSE: dict[str, Any] = {
    "k": None,
    "density": None,
    "criterion": "magnitude",
    "criterion_options": {},
    "fill": False,
    "iterations": 1,
    "l1": (0.0, 0.0),
}
_FULL = {**_SPARSE, "freeze_norms": False, "decouple": False}
"""What full tuning sets: there is nothing to select, and nothing to stay near."""


def _fixes(criterion: Any) -> bool:
    """Does a criterion fix its entries, so that there is no K to choose?"""
    from ..criteria import CRITERIA

    factory = CRITERIA.get(criterion) if isinstance(criterion, str) else None
    return factory is not None and factory().fixed is not None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_SAID_WHOLE = "a whole number of at least 1"
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("k", "iterations", "min_steps", "max_steps"), (_SAID_WHOLE, _whole)),
    **dict.fromkeys(("batch_size", "accumulate", "max_length"), (_SAID_WHOLE, _whole)),
    "density": ("a share in (0, 1], 0.02 for 2 %", lambda x: _number(x) and 0 < x <= 1),
    "criterion": ("the name of a criterion", lambda x: isinstance(x, str)),
    "criterion_options": ("a mapping", lambda x: isinstance(x, Mapping)),
    "options": ("a mapping", lambda x: isinstance(x, Mapping)),
    "l1": ("at least 0", lambda x: _number(x) and x >= 0),
    "epochs": ("above 0", lambda x: _number(x) and x > 0),
    "steps": (_SAID_WHOLE, _whole),
    "lr": ("above 0", lambda x: _number(x) and x > 0),
    "schedule": ("linear, cosine or constant", lambda x: x in ("linear", "cosine", "constant")),
    "warmup": ("in [0, 1)", lambda x: _number(x) and 0 <= x < 1),
    "weight_decay": ("at least 0", lambda x: _number(x) and x >= 0),
    "max_grad_norm": ("at least 0", lambda x: _number(x) and x >= 0),
    "metric": ("the name of a figure", lambda x: isinstance(x, str)),
    "evaluate_every": ('a whole number of steps, or "epoch"', lambda x: x == "epoch" or _whole(x)),
    "held_out": ("in (0, 1)", lambda x: _number(x) and 0 < x < 1),
    "full": ("true or false", lambda x: isinstance(x, bool)),
    "fill": ("true or false", lambda x: isinstance(x, bool)),
    "freeze_norms": ("true or false", lambda x: isinstance(x, bool)),
    "decouple": ("true or false", lambda x: isinstance(x, bool)),
    "precision": ("bf16 or fp16", lambda x: x in ("bf16", "fp16")),
}
_PER_PHASE = ("l1", "epochs", "steps", "lr")
_UNSET = tuple(f.name for f in fields(Recipe) if f.default is None)


def _checked(name: str, value: Any) -> Any:
    """A setting, of the right kind and in its range; one number counts for both phases, and
    becomes a pair, but for `lr`: records have had one number for that.

    Raises:
        RecipeError: It names the setting, what was found, and what would work.
    """
    if value is None and name in _UNSET:
        return None
    said, allows = _ALLOWED[name]
    if name in _PER_PHASE:
        pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
        if len(pair) == 2 and all(allows(x) for x in pair):
            return value if name == "lr" and _number(value) else pair
        said = f"one number, or one for the full and one for the sparse phase, each {said}"
    elif allows(value):
        return value
    raise RecipeError(f"{name} must be {said}; found {value!r}")


_LANGUAGE = Recipe(
    name="lt-sft-language",
    task="mlm",
    origin="paper",
    about="a language, as the paper tells",
    k=LANGUAGE_K,
    l1=(0.1, 0.1),
    epochs=(100, 100),
    min_steps=30_000,
    max_steps=100_000,
    batch_size=8,
    max_length=256,
    lr=5e-5,
    metric="loss",
    evaluate_every=1000,
    held_out=0.05,
    decouple=True,
)
_TAGGING = Recipe(
    name="lt-sft-pos",
    task="tokens",
    origin="paper",
    about="part-of-speech tagging",
    unstated=("max_length",),
    k=K_LADDER[1],
    epochs=(3, 10),
    batch_size=8,
    lr=5e-5,
    metric="accuracy",
    evaluate_every=250,
    options={"tags": "upos"},
)
_NLI = Recipe(
    name="lt-sft-nli",
    task="sequences",
    origin="paper",
    about="natural-language inference; both phases alike, as in the scripts",
    unstated=("max_length",),
    k=K_LADDER[1],
    epochs=(5, 5),
    batch_size=32,
    max_length=128,
    lr=2e-5,
    metric="accuracy",
    evaluate_every=625,
    options={"text": "premise", "pair": "hypothesis"},
)
_SENTIMENT = Recipe(
    name="lt-sft-sentiment",
    task="sequences",
    origin="scripts",
    about="sentiment (NusaX)",
    unstated=("max_length",),
    k=K_LADDER[1],
    epochs=(5, 5),
    batch_size=4,
    accumulate=2,
    lr=2e-5,
    metric="f1",
    evaluate_every="epoch",
)
_QA = Recipe(
    name="lt-sft-qa",
    task="qa",
    origin="scripts",
    about="extractive question answering (SQuAD)",
    unstated=("max_length",),
    k=K_LADDER[1],
    epochs=(2, 2),
    batch_size=12,
    max_length=384,
    lr=3e-5,
    metric="f1",
    evaluate_every=2000,
)
_DENOISED: dict[str, Any] = {
    "origin": "inferred",
    "criterion": "denoised",
    "criterion_options": {"rank": "var:0.9"},
}

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        _LANGUAGE,
        replace(
            _LANGUAGE,
            name="lt-sft-language-high-resource",
            about="a language with much text: 1 % held out, evaluated less often",
            evaluate_every=5000,
            held_out=0.01,
        ),
        replace(
            _LANGUAGE,
            name="lt-sft-language-sweep",
            about="a language in the paper's sweep of densities (footnote 6)",
            max_steps=30_000,
        ),
        replace(
            _LANGUAGE,
            name="lt-sft-language-scripts",
            origin="scripts",
            about="a language, as the released scripts do it: at least 10,000 steps",
            min_steps=10_000,
            batch_size=4,
            accumulate=2,
        ),
        _TAGGING,
        replace(_TAGGING, name="lt-sft-ner", about="named entities", metric="f1", options={}),
        replace(
            _TAGGING,
            name="lt-sft-masakhaner",
            about="named entities, from CoNLL 2003 to MasakhaNER: DATE and MISC count as none",
            metric="f1",
            options={"outside": ["DATE", "MISC"]},
        ),
        replace(
            _TAGGING,
            name="lt-sft-dp",
            task="parsing",
            about="dependency parsing, shallow biaffine head",
            metric="las",
            options={},
        ),
        _NLI,
        _SENTIMENT,
        _QA,
        replace(
            _QA,
            name="lt-sft-qa-multisource",
            about="question answering from several source languages; the last state counts",
            epochs=(5, 5),
            metric=None,
            evaluate_every=None,
        ),
        replace(
            _LANGUAGE,
            **_DENOISED,
            name="deft-x-language",
            about="a language with the denoised mask of DeFT-X",
        ),
        replace(
            _NLI, **_DENOISED, name="deft-x-nli", about="inference with the denoised mask of DeFT-X"
        ),
        replace(
            _SENTIMENT,
            **_DENOISED,
            name="deft-x-sentiment",
            about="sentiment with the denoised mask of DeFT-X",
        ),
        replace(
            _LANGUAGE,
            name="causal-language",
            task="clm",
            origin="ours",
            about="a language for a decoder of any size: K as a share of its entries",
            k=None,
            density=0.028,
        ),
    )
}
"""The presets, by name."""

DEFAULTS = {
    "mlm": "lt-sft-language",
    "clm": "causal-language",
    "tokens": "lt-sft-ner",
    "sequences": "lt-sft-sentiment",
    "qa": "lt-sft-qa",
    "parsing": "lt-sft-dp",
}
"""The preset of each kind of training, where none is named."""


def recipe(name: str, /, **settings: Any) -> Recipe:
    """A preset by name, with some settings changed.

    Args:
        name: One of `RECIPES`.
        **settings: Fields of `Recipe` to set otherwise.

    Raises:
        RecipeError: There is no such preset or setting, or a value is out of range.
    """
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(RECIPES)}"
        raise RecipeError(f"there is no preset {name!r}{hint}")
    return RECIPES[name].changed(**settings)
