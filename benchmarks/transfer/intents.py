"""E2: what a user wants of a home, from English to languages with little text or none.

Sentences are expansions of the templates of `home-assistant-intents`; a template belongs to one
split. Unlabelled text comes from `mediawiki`, so that the SFT of a language sees nothing of the
task's domain, as in the LT-SFT paper. (The quickstart trains on text of the domain.)
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.transfer import mediawiki
from benchmarks.transfer.dataset import Dataset
from benchmarks.transfer.items import Item, counts, write_items, write_lines
from benchmarks.transfer.packages import Packages
from benchmarks.transfer.twins import identity, keys_path, twins
from sparse_ft.quickstart.intents import (
    SOURCE,
    SOURCE_SHARES,
    Language,
    Sentence,
    sample_split,
    split_templates,
    without_ambiguous,
)

__all__ = ["DEVELOPMENT", "INTENTS", "NEEDS", "STAGE0", "TARGETS", "build"]

VERSION = 3
"""Raised when the same packages give other data."""

NEEDS = ("home-assistant-intents", "mediawiki")
"""The packages that `build` takes."""

TARGETS = ("lb", "lt", "ga", "lv", "af", "eu", "gl", "sl", "ne", "ml", "bn", "ca")
"""Luxembourgish is not among XLM-R's languages. All have templates of 17 labels or more, and
messages in MediaWiki. Each two are each other's wrong language: no kin, and with about as much
text, but for Irish, which has the least."""

DEVELOPMENT = ("de-CH", "is", "cy")
"""Those that the quickstart's recipe was chosen on. Of Swiss German, XLM-R saw none."""

STAGE0 = (SOURCE, "fr", "de", "ru", "tr", "id")
"""Languages that the model has seen."""

INTENTS = (
    *("HassCancelAllTimers", "HassCancelTimer", "HassClimateGetTemperature"),
    *("HassClimateSetTemperature", "HassGetCurrentDate", "HassGetCurrentTime", "HassGetState"),
    *("HassGetWeather", "HassLightSet", "HassMediaNext", "HassMediaPause", "HassMediaUnpause"),
    *("HassPauseTimer", "HassStartTimer", "HassTimerStatus", "HassTurnOff", "HassTurnOn"),
    *("HassUnpauseTimer", "HassVacuumCleanArea"),
)
"""The labels: intents that English has two usable templates of and Luxembourgish one, but for
HassNevermind, which is one word."""

TRAIN = (120, 40)
"""Sentences of an intent and of a template, at most."""
TEST = (60, 10)
"""Likewise, of dev and test."""

_MEDIAWIKI = {"de-CH": "gsw"}


def build(
    folder: Path,
    packages: Packages,
    *,
    targets: Sequence[str] = TARGETS,
    development: Sequence[str] = DEVELOPMENT,
    stage0: Sequence[str] = STAGE0,
) -> Dataset:
    """Builds the data of E2.

    Args:
        folder: Where the files go; created when missing.
        packages: Where `home-assistant-intents` and `mediawiki` are.
        targets: Languages that are reported, in the codes of `home-assistant-intents`.
        development: Languages that settings may be chosen on.
        stage0: Languages of the text for the base model's head.

    Raises:
        PackageError: One of the packages cannot be had.
    """
    tested = [SOURCE, *targets, *development]
    drawn = {key: some for code in tested for key, some in _drawn(packages, code).items()}
    secret = [s for (_, part), some in drawn.items() if part == "test" for s in some]
    drawn[SOURCE, "dev"] = _without_twins(drawn[SOURCE, "dev"], secret)
    secret += [s for (_, part), some in drawn.items() if part == "dev" for s in some]
    drawn[SOURCE, "train"] = _without_twins(drawn[SOURCE, "train"], secret)
    parts = {(code, part): _items(code, some) for (code, part), some in drawn.items()}
    files = {
        (code, part): write_items(folder / part / f"{code}.jsonl", some)
        for (code, part), some in parts.items()
    }
    held = {identity(sentence.text) for sentence in secret}
    text = {
        code: write_lines(folder / f"text/{code}.txt", _messages(packages, code, held))
        for code in dict.fromkeys([*tested, *stage0])
    }
    test = {code: files[code, "test"] for code in tested}
    dataset = Dataset(
        name="intents",
        task="sequences",
        metric="accuracy",
        source=SOURCE,
        targets=tuple(targets),
        development=tuple(development),
        train=files[SOURCE, "train"],
        dev=files[SOURCE, "dev"],
        test=test,
        text={code: text[code] for code in tested},
        stage0=tuple(text[code] for code in stage0),
        # Nothing of these is reported, so all of it may serve.
        dev_of={code: test[code] for code in development},
        groups={code: keys_path(path) for code, path in test.items()},
        options={"metric": "accuracy", "pooling": "mean"},
        about={
            "builder": VERSION,
            "packages": packages.about(NEEDS),
            "counts": counts(parts, text),
            "labels": "by the intents that templates were written for",
        },
    )
    if there := twins(dataset):
        raise AssertionError(f"intents: {len(there)} held-out items are trained on, as {there[0]}")
    return dataset.save(folder)


def _drawn(packages: Packages, code: str) -> dict[tuple[str, str], list[Sentence]]:
    """(language, part) → sentences of the templates that belong to the part."""
    path = packages.get("home-assistant-intents") / "data" / f"{code}.json"
    language = Language(code, json.loads(path.read_text(encoding="utf-8")))
    templates = {i: some for i, some in language.templates.items() if i in INTENTS}
    # Nothing is learnt from the templates of other languages.
    shares = SOURCE_SHARES if code == SOURCE else {"test": 1.0}
    return {
        (code, part): without_ambiguous(
            sample_split(
                language,
                chosen,
                *(TRAIN if part == "train" else TEST),
                random.Random(f"{code} {part}"),
            )
        )
        for part, chosen in split_templates(templates, shares).items()
    }


def _without_twins(sentences: Iterable[Sentence], held: Iterable[Sentence]) -> list[Sentence]:
    """Leaves out what is a held-out sentence with other names and numbers in it."""
    skeletons = {identity(sentence.skeleton) for sentence in held}
    return [s for s in sentences if identity(s.skeleton) not in skeletons]


def _items(code: str, sentences: Iterable[Sentence]) -> list[Item]:
    # Languages have rules of the same names, so equal templates need not give equal sentences.
    return [Item(f"{code} {s.intent} {s.template}", s.text, s.intent) for s in sentences]


def _messages(packages: Packages, code: str, held: set[str]) -> list[str]:
    """The text of a language: all messages, but those that read like a held-out sentence."""
    found = mediawiki.messages(packages.get("mediawiki"), _MEDIAWIKI.get(code, code))
    return [m.text for m in mediawiki.distinct(found) if identity(m.text) not in held]
