"""The papers' tasks as records, and how the files of their data sets are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PRESETS", "Layout", "Preset", "code_of"]

# Names in the place of codes: of NusaX's folders, and of English.
CODES = {
    "acehnese": "ace", "balinese": "ban", "banjarese": "bjn", "buginese": "bug", "eng": "en",
    "english": "en", "ind": "id", "indonesian": "id", "javanese": "jv", "madurese": "mad",
    "minangkabau": "min", "ngaju": "nij", "sundanese": "su", "toba_batak": "bbc",
}  # fmt: skip
SPLITS = {"valid": "dev", "testa": "dev", "testb": "test", "dev_matched": "dev"}
# The treebanks of the paper (appendix B), where a language has several.
TREEBANKS = {
    "ar": "pud", "bm": "crb", "bxr": "bdt", "en": "ewt", "fo": "farpahc", "gv": "cadhan",
    "hsb": "ufal", "ja": "gsd", "kpv": "lattice", "mt": "mudt", "myv": "jr", "olo": "kkpp",
    "sa": "ufal", "sme": "giella", "ug": "udt", "yue": "hk", "zh": "gsd",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How a data set's files are called.

    Attributes:
        names: Their paths, from some folder on: * and ? as in a shell, <language> a code, <name> a
            language's name, <bank> a treebank's, and <train|dev|test> the split.
        language: Of all its files, where their names do not say it; "" where a column does.
    """

    names: str
    language: str | None = None

    def match(self, path: Path) -> dict[str, str] | None:
        """What a path's name says: "split", and "language" or "bank"; None: not of this layout."""
        groups = {
            "language": r"(?P<language>[a-z]{2,3})",
            "name": r"(?P<language>[a-z_]+)",
            "bank": r"(?P<bank>[a-z0-9]+)",
        }
        parts = re.split(r"<(.*?)>", self.names)
        for i, part in enumerate(parts):
            if i % 2:
                parts[i] = groups.get(part, f"(?P<split>{part})")
            else:
                parts[i] = re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
        found = re.search(f"(?:^|/){''.join(parts)}$", path.as_posix())
        return None if found is None else found.groupdict()


@dataclass(frozen=True)
class Preset:
    """A task of the papers, with their settings.

    Attributes:
        name: What it is called here and in `papers`.
        task: Kind of the task, as `sparse_ft.tasks` names it.
        metric: What the papers report.
        source: Language of the labelled training data.
        base: The pretrained model, as the Hub names it (LT-SFT, table 1).
        recipe: The preset of `sparse_ft.tasks.recipes` for the task.
        layouts: Of the data sets; where two have a file for one thing, the first counts.
        options: Of the task.
        columns: What a table's columns are where no line names them, by their number.
        labels: Spellings of labels → the label; no other is one. Empty: any label, as it is.
    """

    name: str
    task: str
    metric: str
    source: str
    base: str
    recipe: str
    layouts: tuple[Layout, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[tuple[str, ...], ...] = ()
    labels: Mapping[str, str | None] = field(default_factory=dict)


_UD = (Layout("<language>_<bank>-ud-<train|dev|test>.conllu"),)
_PAIR = ("premise", "hypothesis", "label")
_MBERT, _XLMR = "bert-base-multilingual-cased", "xlm-roberta-base"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "pos", "tokens", "accuracy", "en", _MBERT, "lt-sft-pos", _UD,
            options={"tags": "upos", "metric": "accuracy"},
        ),
        Preset("dp", "parsing", "las", "en", _MBERT, "lt-sft-dp", _UD),
        Preset(
            "ner", "tokens", "f1", "en", _MBERT, "lt-sft-masakhaner",
            (
                Layout("eng.<train|testa|testb>", "en"),
                Layout("conll*/<train|valid|dev|test>.txt", "en"),
                Layout("<language>/<train|dev|test>.txt"),
            ),
            options={"outside": ["DATE", "MISC"]},
        ),
        Preset(
            "nli", "sequences", "accuracy", "en", _XLMR, "lt-sft-nli",
            (
                Layout("multinli.<train>.<language>.tsv"),
                Layout("multinli_1.0_<train|dev_matched>.jsonl", "en"),
                Layout("xnli.<dev|test>.tsv", ""),
                Layout("<dev|test>.?sv", ""),
                Layout("anli.<dev|test>.tsv", ""),
                Layout("<dev|test>/<language>.?sv"),
            ),
            options={"text": "premise", "pair": "hypothesis"},
            columns=(_PAIR, ("language", *_PAIR), ("id", "language", *_PAIR)),
            labels={
                **{name: name for name in ("entailment", "neutral", "contradiction")},
                "contradictory": "contradiction",
                "-": None,  # of MultiNLI's annotators, no majority
            },
        ),
        Preset(
            "sentiment", "sequences", "f1", "id", _XLMR, "lt-sft-sentiment",
            (
                Layout("<train|valid>_preprocess.tsv", "id"),
                Layout("<name>/<train|valid|test>.csv"),
            ),
            options={"metric": "f1"},
            columns=(("text", "label"), ("id", "text", "label")),
            labels={name: name for name in ("positive", "neutral", "negative")},
        ),
    )
}  # fmt: skip
"""The papers' tasks, by name."""


def code_of(name: str) -> str:
    """A language's code, by its name or its code."""
    return CODES.get(name.lower(), name)
