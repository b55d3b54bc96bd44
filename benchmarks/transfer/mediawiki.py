"""Messages of MediaWiki: parallel short texts in some 500 languages, from Debian's package.

Each folder `i18n` holds one JSON file a language, message key → text, with the same keys in all
languages. Texts are taken as plain text, in one line; what software fills in ($1) is left out.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.transfer.twins import forms, identity

__all__ = [
    "ENGLISH",
    "Message",
    "clean",
    "distinct",
    "held_out",
    "languages",
    "messages",
    "split",
    "training",
]

ENGLISH = "en"
"""Whose file holds every key; messages that equal the English ones are not translated."""

_ROOT = Path("usr/share/mediawiki")
_FOLDERS = (
    "languages/i18n",
    "languages/i18n/exif",
    "includes/*/i18n",
    "extensions-core/**/i18n",
    "extensions-core/**/i18n/ve-*",
    "skins/*/i18n",
)
# In tenths: train, dev, test.
_TRAIN, _DEV = 6, 1

_SITE_NAME = "Wiki"
# The innermost {{…}}: others follow once it is gone.
_BRACES = re.compile(r"\{\{([^{}]*)\}\}")
_STEPS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"(?s)<!--.*?-->", " "),
        (r"(?i)<br\s*/?>|</(?:p|li|div|h\d)>", " "),
        (r"</?[A-Za-z][^<>]*>", ""),
        # [[image|thumb|…]], [[target|label]], [[:target]], [URL label]
        (r"\[\[[^\[\]|]*\|thumb\b[^\[\]]*\]\]", ""),
        (r"\[\[:?(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1"),
        (r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]", r"\1"),
        (r"\[\$\d+\s+([^\]]*)\]", r"\1"),
        (r"(?:https?:)?//\S+", ""),
        # Bold and italics; lists, headings and indents at the start of a line.
        (r"'{2,}", ""),
        (r"(?m)^[*#:;=\s]+|[=\s]+$", " "),
        (r"\$\d+|~{3,5}|__[A-Z]+__", ""),
        (r"\"\s*\"|“\s*”|«\s*»|„\s*“|\(\s*\)|\[\s*\]|'\s*'(?!\w)", ""),
        (r"\s+", " "),
        (r" (?=[.,;)\]])|(?<=[(\[]) ", ""),
        (r"(?: ?[,:])+(?=[.,;])", ""),
    )
)
_LETTER = re.compile(r"[^\W\d_]")
# Tables, data, templates and addresses that are still there: not plain text.
_MARKUP = re.compile(r"[{}|]|\[\[|\]\]|://")


@dataclass(frozen=True)
class Message:
    """A message in one language.

    Args:
        key: What it is called, in all languages.
        folder: Where its file lies below MediaWiki's root, such as "extensions-core/Cite/i18n".
        text: Cleaned, one line.
    """

    key: str
    folder: str
    text: str


def split(key: str) -> str:
    """The part that a message belongs to, in every language and experiment: by its key alone.

    Returns:
        "train" (6 of 10), "dev" (1) or "test" (3).
    """
    tenth = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return "train" if tenth < _TRAIN else "dev" if tenth < _TRAIN + _DEV else "test"


def clean(text: str) -> str:
    """The plain text of a message, in one line.

    Markup, addresses and parameters ($1) are left out. Of {{PLURAL:…}} the last form stays, which
    is the general one, of {{GENDER:…}} the first, of {{GRAMMAR:case|word}} the word; the site's
    name is "Wiki".

    Args:
        text: As the message's file has it.
    """
    while (changed := _BRACES.sub(_form, text)) != text:
        text = changed
    text = html.unescape(text)
    for pattern, by in _STEPS:
        text = pattern.sub(by, text)
    return text.strip()


def _form(braces: re.Match[str]) -> str:
    """What stays of {{name:argument|form|form}}."""
    head, *forms = braces[1].split("|")
    name = head.partition(":")[0].strip().upper()
    if name == "SITENAME":
        return _SITE_NAME
    if name not in ("PLURAL", "GENDER", "GRAMMAR") or not forms:
        return ""
    if name == "GENDER":
        return forms[0]
    # "0=none" and "1=one" are for those numbers alone.
    general = [form for form in forms if not re.match(r"\s*\d+\s*=", form)]
    return general[-1] if general else ""


@cache
def _folders(package: Path) -> tuple[Path, ...]:
    root = package / _ROOT
    found = {folder for pattern in _FOLDERS for folder in root.glob(pattern) if folder.is_dir()}
    return tuple(sorted(found))


def languages(package: Path) -> list[str]:
    """The codes of the languages that have messages, ascending.

    Args:
        package: The unpacked package, as `Packages.get("mediawiki")` gives it.
    """
    found = {path.stem for folder in _folders(package) for path in folder.glob("*.json")}
    return sorted(found - {"qqq"})  # the documentation of the messages


@cache
def messages(package: Path, language: str) -> tuple[Message, ...]:
    """The messages of a language that are plain text with words, by folder and key.

    Messages that equal the English ones of the same key are left out. Texts may occur twice, under
    several keys: see `training` and `distinct`.

    Args:
        package: The unpacked package, as `Packages.get("mediawiki")` gives it.
        language: MediaWiki's code, such as "frp".

    Raises:
        ValueError: The package has no messages in that language.
    """
    root, found = package / _ROOT, []
    for folder in _folders(package):
        texts, name = _texts(folder, language), folder.relative_to(root).as_posix()
        english = {} if language == ENGLISH else _texts(folder, ENGLISH)
        for key, text in sorted(texts.items()):
            if identity(text) != identity(english.get(key, "")):
                found.append(Message(key, name, text))
    if not found:
        raise ValueError(f"{root} has no messages in {language!r}")
    return tuple(found)


@cache
def _texts(folder: Path, language: str) -> dict[str, str]:
    """Key → cleaned text of a file; none where the folder lacks the language."""
    path = folder / f"{language}.json"
    if not path.is_file():
        return {}
    texts = json.loads(path.read_text(encoding="utf-8"))
    cleaned = {key: clean(text) for key, text in texts.items() if isinstance(text, str)}
    return {
        key: text
        for key, text in cleaned.items()
        if _LETTER.search(text) and not _MARKUP.search(text)
    }


def distinct(found: Iterable[Message]) -> list[Message]:
    """Messages whose text has not come before."""
    seen: set[str] = set()
    kept = []
    for message in found:
        if (known := identity(message.text)) not in seen:
            seen.add(known)
            kept.append(message)
    return kept


def training(package: Path, language: str, held: Container[str]) -> list[Message]:
    """The messages of a language that may be trained on, labelled or not.

    These are those whose key is in the training part, without such as read like a held-out text,
    but for one word at most: in this language, or by the English message of their key.

    Args:
        package: The unpacked package.
        language: MediaWiki's code.
        held: What held-out texts have in common with their like, as `held_out` gives it.
    """
    english = {message.key: message.text for message in messages(package, ENGLISH)}

    def free(text: str) -> bool:
        return not any(form in held for form in forms(text))

    return distinct(
        message
        for message in messages(package, language)
        if split(message.key) == "train"
        and free(message.text)
        and free(english.get(message.key, ""))
    )


def held_out(package: Path, languages: Iterable[str]) -> set[str]:
    """What tells texts that read like one whose key is not in the training part.

    Args:
        package: The unpacked package.
        languages: Those of an experiment; English always counts.
    """
    return {
        form
        for language in {ENGLISH, *languages}
        for message in messages(package, language)
        if split(message.key) != "train"
        for form in forms(message.text)
    }
