"""E1: parts of speech of MediaWiki's messages, from English to languages without a treebank.

The labels are Apertium's (`apertium.py`): dictionary-derived, no gold standard, no Universal
Dependencies treebank. Beside all labels there is the view "unambiguous", of words on which the
lexicon alone decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.transfer import apertium, mediawiki
from benchmarks.transfer.apertium import PUNCTUATION, UNKNOWN, Analyser, Word
from benchmarks.transfer.dataset import Dataset
from benchmarks.transfer.items import write_lines, write_messages
from benchmarks.transfer.mediawiki import Message
from benchmarks.transfer.packages import Packages
from benchmarks.transfer.twins import keys_path, near_twins, twins

__all__ = ["ANALYSERS", "NEEDS", "STAGE0", "VERSION", "build"]

VERSION = 4
"""Of what `build` makes of the same packages."""

SOURCE = "en"
TARGETS = ("frp", "an")
"""Arpitan and Aragonese: not among the languages of XLM-R."""
DEVELOPMENT = ("oc", "sc")
"""Occitan and Sardinian: likewise unseen, and as near to seen ones as the targets are."""
STAGE0 = ("en", "fr", "de", "ru", "tr", "id", "es", "it", "ca", "pt")
"""Seen languages for the base model's head; the first six come to some 300 k pieces."""

ANALYSERS: dict[str, Analyser] = {
    "en": Analyser("apertium-eng-cat", "eng-cat", rules=True, perceptron=True),
    "frp": Analyser("apertium-fra-frp", "frp-fra", rules=True),
    "an": Analyser("apertium-spa-arg", "arg-spa"),
    "sc": Analyser("apertium-srd-ita", "srd-ita", rules=True),
    "oc": Analyser("apertium-oci-fra", "oci-fra", rules=True),
}
NEEDS = ("mediawiki", *apertium.TOOLS, *(analyser.package for analyser in ANALYSERS.values()))
"""The packages that `build` takes."""

_MIN_WORDS = 4
_MAX_WORDS = 100
_MIN_KNOWN = 0.5
"""Of the words, for a sentence to be of that language and worth a label."""

Sentence = tuple[Message, list[Word]]


def build(folder: Path, packages: Packages) -> Dataset:
    """Builds the data set.

    Args:
        folder: Where its files go.
        packages: Where MediaWiki and Apertium come from.

    Raises:
        PackageError: A package cannot be had.
    """
    folder = Path(folder)
    wiki = packages.get("mediawiki")
    languages = (SOURCE, *TARGETS, *DEVELOPMENT)
    held = mediawiki.held_out(wiki, languages)
    counts: dict[str, dict[str, Any]] = {}

    text = {}
    for language in dict.fromkeys((*languages, *STAGE0)):
        found = mediawiki.training(wiki, language, held)
        text[language] = write_messages(folder / f"text/{language}.txt", found)
        counts[language] = {
            "text": {"lines": len(found), "words": sum(len(m.text.split()) for m in found)}
        }

    test, views, dev_of = {}, {}, {}
    for language in languages:
        parts = _held(wiki, language)
        if language == SOURCE:
            parts["train"] = mediawiki.training(wiki, language, held)
        labelled = _labelled(packages, language, parts)
        if language == SOURCE:
            train = _write(folder / "train.conllu", labelled["train"])
            dev = _write(folder / "dev.conllu", labelled["dev"])
        if language in DEVELOPMENT:
            # Nothing of these languages is reported: all of it may serve.
            both = labelled["dev"] + labelled["test"]
            dev_of[language] = _write(folder / f"dev/{language}.conllu", both)
        test[language] = _write(folder / f"test/{language}.conllu", labelled["test"])
        views[language] = {
            "unambiguous": _write(
                folder / f"unambiguous/{language}.conllu", map(_unambiguous, labelled["test"])
            )
        }
        counts[language] |= {part: _counts(found) for part, found in labelled.items()}

    dataset = Dataset(
        name="pos",
        task="tokens",
        metric="accuracy",
        source=SOURCE,
        targets=TARGETS,
        development=DEVELOPMENT,
        options={"tags": "upos", "metric": "accuracy", "unlabelled": [UNKNOWN, PUNCTUATION]},
        text={language: text[language] for language in languages},
        stage0=tuple(text[language] for language in STAGE0),
        train=train,
        dev=dev,
        test=test,
        dev_of=dev_of,
        views=views,
        groups={language: keys_path(path) for language, path in test.items()},
        about={
            "builder": VERSION,
            "packages": packages.about(NEEDS),
            "counts": counts,
            "labels": "by Apertium's lexica and taggers; not gold",
        },
    )
    if found_twins := [*twins(dataset), *near_twins(dataset)]:
        raise AssertionError(f"held-out messages in the training data: {found_twins[:3]}")
    return dataset.save(folder)


def _held(wiki: Path, language: str) -> dict[str, list[Message]]:
    """The messages of the parts "test" and "dev"; a text that both have is in the test part."""
    parts: dict[str, list[Message]] = {"test": [], "dev": []}
    for message in mediawiki.messages(wiki, language):
        if (part := mediawiki.split(message.key)) in parts:
            parts[part].append(message)
    test = mediawiki.distinct(parts["test"])
    both = mediawiki.distinct(parts["test"] + parts["dev"])
    return {"test": test, "dev": both[len(test) :]}


def _labelled(
    packages: Packages, language: str, parts: Mapping[str, Sequence[Message]]
) -> dict[str, list[Sentence]]:
    """The sentences of each part that can be labelled, in one run of the tagger."""
    asked = [
        (part, message)
        for part, messages in parts.items()
        for message in messages
        if _MIN_WORDS <= len(message.text.split()) <= _MAX_WORDS
    ]
    tagged = apertium.tagged(packages, ANALYSERS[language], [message.text for _, message in asked])
    found: dict[str, list[Sentence]] = {part: [] for part in parts}
    for (part, message), words in zip(asked, tagged, strict=True):
        if words and _known(words) >= _MIN_KNOWN:
            found[part].append((message, words))
    return found


def _known(words: Sequence[Word]) -> float:
    """The share of words, without punctuation, that have a label."""
    tags = [word.tag for word in words if word.tag != PUNCTUATION]
    return sum(tag != UNKNOWN for tag in tags) / max(1, len(tags))


def _unambiguous(sentence: Sentence) -> Sentence:
    message, words = sentence
    return message, [Word(w.form, UNKNOWN) if w.ambiguous else w for w in words]


def _counts(sentences: Sequence[Sentence]) -> dict[str, int]:
    """Words are counted without punctuation; "labelled" is what is scored."""
    words = [w for _, found in sentences for w in found if w.tag != PUNCTUATION]
    labelled = [w for w in words if w.tag != UNKNOWN]
    return {
        "sentences": len(sentences),
        "words": len(words),
        "labelled": len(labelled),
        "unambiguous": sum(not w.ambiguous for w in labelled),
    }


def _write(path: Path, sentences: Iterable[Sentence]) -> Path:
    """Writes CoNLL-U, and the messages' keys beside it."""
    some = list(sentences)
    lines = []
    for message, words in some:
        rows = [f"{i}\t{word.form}\t_\t{word.tag}" + "\t_" * 6 for i, word in enumerate(words, 1)]
        lines += [f"# sent_id = {message.key}", *rows, ""]
    write_lines(keys_path(path), (message.key for message, _ in some))
    return write_lines(path, lines)
