"""E3: what a message of MediaWiki is about, from English to languages that XLM-R never saw.

A message's folder and key tell its topic, the same in every language. A message with a topic whose
key is not in the training part is held out in all languages, and so is whatever reads like it in
any of them, but for one word at most; the unlabelled text of a language is what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.transfer.dataset import Dataset
from benchmarks.transfer.items import Item, counts, distinct, write_items, write_messages
from benchmarks.transfer.mediawiki import ENGLISH, Message, messages, split
from benchmarks.transfer.mediawiki import distinct as distinct_messages
from benchmarks.transfer.packages import Packages
from benchmarks.transfer.twins import forms, identity, keys_path, near_twins, twins

__all__ = ["DEVELOPMENT", "NEEDS", "RULES", "STAGE0", "TARGETS", "Rule", "build", "items", "topic"]

VERSION = 3
"""Raised when the same packages give other data."""

NEEDS = ("mediawiki",)
"""The packages that `build` takes."""

TARGETS = (
    *("hsb", "se", "myv", "mt", "kv", "bxr", "olo", "ig", "fo", "bjn", "ban", "yo", "min", "qu"),
    *("lb", "pms", "lij", "ilo", "lmo", "ba", "nap", "krc", "frp", "tt-cyrl", "tyv", "mdf"),
    *("cv", "udm", "sah", "mhr", "an", "kab"),
)
"""None is among XLM-R's languages. The first fourteen are of the papers of LT-SFT and DeFT-X.

Each two are each other's wrong language: no kin, and with about as much text."""

DEVELOPMENT = ("bcl", "ksh", "tk", "vep")
"""Likewise, kin of targets: Central Bikol, Ripuarian, Turkmen and Veps, to choose settings on."""

STAGE0 = (ENGLISH, "fr", "de", "ru", "tr", "id")
"""Languages that the model has seen."""

LEAST_WORDS = 3


@dataclass(frozen=True)
class Rule:
    """Which messages have a topic.

    Args:
        topic: The label.
        folder: Regular expression for the beginning of a message's folder.
        key: Likewise for that of its key.
    """

    topic: str
    folder: str
    key: str = ""

    def holds(self, message: Message) -> bool:
        """Whether a message has this topic."""
        return bool(re.match(self.folder, message.folder) and re.match(self.key, message.key))


_CORE = "languages/i18n$"
_EDITORS = (
    "extensions-core/(CodeEditor|Cite/modules|TemplateData|VisualEditor|WikiEditor)/(?!.*api$)"
)

RULES = (
    Rule("abusefilter", "extensions-core/AbuseFilter/i18n$"),
    Rule("account", "extensions-core/OATHAuth/i18n$"),
    Rule("editor", _EDITORS),
    Rule("exif", "languages/i18n/exif$"),
    Rule("installer", "includes/installer/i18n$"),
    Rule("media", "extensions-core/MultimediaViewer/i18n$"),
    Rule("rights", _CORE, "action-|editusergroup|grant-|listgr(ouprights|ants)|right|userrights"),
    Rule(
        "account",
        _CORE,
        "account|auth(manager|provider|form|page)|badretype|botpassword|change(cred|email)|"
        "confirmemail|create(acct|account)|email(auth|conf|notauth)|log(in|out)|noemail|"
        "nosuchuser|password|removecred|resetpass|userlogin|wrongpassword",
    ),
    Rule(
        "deletion",
        _CORE,
        "cannotdelete|confirmdelete|delet(e|ing)|dellogpage|ex(before|content)|filedelete|"
        "logdelete|rev-(deleted|suppressed)|revdelete|undelete",
    ),
    Rule(
        "media",
        _CORE,
        "badfilename|duplicatesoffile|emptyfile|file|illegal-?filename|im(age|g)|large-?file|"
        "listfiles|media(statistics|warning)|newimages|noimages|sharedupload|show-big|svg|thumb|"
        "unusedimages|upload",
    ),
    Rule(
        "changes",
        _CORE,
        "(added|removed|un)?watch|contrib|diff|enotif|hist|lineno|mergehist|newpages|patrol|"
        "rc(days|filters|list|note|show)|recentchanges|revision|rollback|tags?-|tog-.*watch|"
        "undo-|wl",
    ),
)
"""The first one that holds counts. A message that none holds for has no topic."""


def topic(message: Message) -> str | None:
    """What a message is about; None where nothing tells."""
    return next((rule.topic for rule in RULES if rule.holds(message)), None)


def items(found: Iterable[Message], part: str) -> list[Item]:
    """The messages of a part that have a topic and `LEAST_WORDS` words, each text once.

    Args:
        found: Messages of one language.
        part: "train", "dev" or "test".
    """
    return distinct(
        Item(message.key, message.text, label)
        for message in found
        if split(message.key) == part
        and len(re.findall(r"\w+", message.text)) >= LEAST_WORDS
        and (label := topic(message)) is not None
    )


def build(
    folder: Path,
    packages: Packages,
    *,
    targets: Sequence[str] = TARGETS,
    development: Sequence[str] = DEVELOPMENT,
    stage0: Sequence[str] = STAGE0,
) -> Dataset:
    """Builds the data of E3.

    Args:
        folder: Where the files go; created when missing.
        packages: Where `mediawiki` is.
        targets: Languages that are reported, in MediaWiki's codes.
        development: Languages that settings may be chosen on.
        stage0: Languages of the text for the base model's head.

    Raises:
        PackageError: The package cannot be had.
    """
    tree = packages.get(*NEEDS)
    tested = [ENGLISH, *targets, *development]
    found = {code: messages(tree, code) for code in dict.fromkeys([*tested, *stage0])}
    keys, texts = _held(found)
    free = {
        code: [m for m in some if m.key not in keys and texts.isdisjoint(forms(m.text))]
        for code, some in found.items()
    }
    parts = {(code, "test"): items(found[code], "test") for code in tested}
    tests = {identity(item.text) for item in parts[ENGLISH, "test"]}
    dev = items(found[ENGLISH], "dev")
    parts[ENGLISH, "dev"] = [item for item in dev if identity(item.text) not in tests]
    parts[ENGLISH, "train"] = items(free[ENGLISH], "train")
    files = {
        (code, part): write_items(folder / part / f"{code}.jsonl", some)
        for (code, part), some in parts.items()
    }
    text = {
        code: write_messages(folder / f"text/{code}.txt", distinct_messages(some))
        for code, some in free.items()
    }
    test = {code: files[code, "test"] for code in tested}
    dataset = Dataset(
        name="topics",
        task="sequences",
        metric="accuracy",
        source=ENGLISH,
        targets=tuple(targets),
        development=tuple(development),
        train=files[ENGLISH, "train"],
        dev=files[ENGLISH, "dev"],
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
            "labels": "by the folders and keys of messages",
        },
    )
    if there := [*twins(dataset), *near_twins(dataset)]:
        raise AssertionError(f"topics: {len(there)} held-out items are trained on, as {there[0]}")
    return dataset.save(folder)


def _held(found: Mapping[str, Sequence[Message]]) -> tuple[set[str], set[str]]:
    """The keys of what is held out, and the `forms` of its texts in all languages."""
    out = [m for some in found.values() for m in some if split(m.key) != "train" and topic(m)]
    texts = {form for message in out for form in forms(message.text)}
    # A message that reads like a held-out one in English means the same in other words elsewhere.
    alike = (m for m in found[ENGLISH] if not texts.isdisjoint(forms(m.text)))
    return {message.key for message in (*out, *alike)}, texts
