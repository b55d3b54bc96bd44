"""Parts of speech by Apertium: a lexicon's readings of each word, and a tagger's choice of one.

The pipeline is the pair's own: `lt-proc` looks words up, `cg-proc` strikes readings out by rules,
where the pair has some, and `apertium-tagger` chooses among the rest. What the lexicon alone says,
before anything chooses, is kept beside: where all readings have one part of speech, no statistics
are in the label.

https://wiki.apertium.org/wiki/Apertium_stream_format
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.transfer.packages import PackageError, Packages

__all__ = ["PUNCTUATION", "TOOLS", "UNKNOWN", "UPOS", "Analyser", "Word", "parsed", "tagged"]

UNKNOWN = "X"
"""Tag of words without a label: not in the lexicon, or part of an entry of several words."""
PUNCTUATION = "PUNCT"

TOOLS = ("lttoolbox", "liblttoolbox3", "apertium", "libapertium3", "cg3", "libcg3-1")
"""The packages with the programs."""

UPOS: dict[str, str] = {
    "n": "NOUN",
    "np": "PROPN",
    # The verbs "be" and "have" are auxiliaries throughout, as the lexica have them.
    "vblex": "VERB",
    "vbser": "AUX",
    "vbhaver": "AUX",
    "vbmod": "AUX",
    "vbdo": "AUX",
    "vaux": "AUX",
    "adj": "ADJ",
    "adv": "ADV",
    "preadv": "ADV",
    "postadv": "ADV",
    "det": "DET",
    "predet": "DET",
    "detnt": "DET",
    "prn": "PRON",
    "rel": "PRON",
    "pr": "ADP",
    "cnjcoo": "CCONJ",
    "cnjsub": "SCONJ",
    "cnjadv": "SCONJ",
    "num": "NUM",
    "gen": "PART",
    "ij": "INTJ",
    # Where a subclass is another part of speech than its class.
    "rel.adv": "ADV",
    "det.ord": "ADJ",
    "num.ord": "ADJ",
    "adj.pos": "DET",
} | dict.fromkeys(
    ("sent", "cm", "lpar", "rpar", "lquot", "rquot", "lquest", "quot", "guio", "apos"), PUNCTUATION
)
"""Apertium's tag, or its first two, to Universal Dependencies' part of speech; others are X."""

_TIMEOUT = 300
"""Seconds that one program may take for all texts."""

# What the stream format gives a meaning.
_SPECIAL = re.compile(r"[\\^$/<>{}\[\]@]")
_STOP, _MARK = "^./.<sent>$", "[;]"
_END = _STOP + _MARK
_UNIT = re.compile(r"(?<!\\)\^((?:\\.|[^$\\])*)\$")
_PART = re.compile(r"(?:\\.|[^/\\])+")
_TAGS = re.compile(r"<([^<>]*)>(?:<([^<>]*)>)?")


@dataclass(frozen=True)
class Analyser:
    """A lexicon and a tagger for one language.

    Args:
        package: The pair's package, such as "apertium-fra-frp".
        direction: The files' stem, such as "frp-fra".
        rules: Whether the pair's own pipeline has constraint rules (`.rlx.bin`).
        perceptron: Whether its tagger is a perceptron; else a hidden Markov model.
    """

    package: str
    direction: str
    rules: bool = False
    perceptron: bool = False


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Args:
        form: As the text has it, without white space.
        tag: Universal part of speech; "X" where there is no label.
        ambiguous: Whether the lexicon has readings with different parts of speech.
    """

    form: str
    tag: str
    ambiguous: bool = False


def tagged(packages: Packages, analyser: Analyser, texts: Sequence[str]) -> list[list[Word] | None]:
    """Tags the words of texts, all in one run of each program.

    Args:
        packages: Where the programs and the lexicon come from.
        analyser: Of the texts' language.
        texts: One line each, without the character U+0000.

    Returns:
        Words whose forms, put together, are the text without its white space; None for a text that
        the programs did not give back so.

    Raises:
        PackageError: A package cannot be had, or its programs do not run here.
    """
    trees = {name: packages.get(name) for name in TOOLS}
    folder = packages.get(analyser.package) / f"usr/share/apertium/{analyser.package}"
    stem = folder / analyser.direction
    environment = dict(os.environ)
    # Debian keeps libraries under the machine's name: usr/lib/x86_64-linux-gnu.
    libraries = {str(found.parent) for tree in trees.values() for found in tree.glob("usr/lib/*/*")}
    environment["LD_LIBRARY_PATH"] = ":".join(sorted(libraries))
    environment["LC_ALL"] = "C.UTF-8"

    def run(package: str, *command: str, given: str) -> str:
        program = trees[package] / "usr/bin" / command[0]
        try:
            done = subprocess.run(
                [program, *command[1:]],
                input=given.encode(),
                capture_output=True,
                env=environment,
                timeout=_TIMEOUT,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").strip()
            reason = (said or str(error)).splitlines()[-1]
            raise PackageError(
                f"{program} does not run ({reason}): it needs Debian 12 and its libraries: "
                "apt-get install libicu72 libxml2"
            ) from None
        return done.stdout.decode("utf-8", "replace")

    # Nothing crosses a null character: each program flushes there. Some lexica lose a sign that
    # stands right before it.
    given = "".join(_SPECIAL.sub(r"\\\g<0>", text) + "\n\0" for text in texts)
    read = run("lttoolbox", "lt-proc", "-w", "-z", f"{stem}.automorf.bin", given=given)
    left = read
    if analyser.rules:
        left = run("cg3", "cg-proc", "-w", "-z", f"{stem}.rlx.bin", given=left)
    # The perceptron flushes at sentence ends alone: each text is given one, and a mark behind it.
    given = _END.join(left.split("\0"))
    kind = "-gx" if analyser.perceptron else "-g"
    chosen = run("apertium", "apertium-tagger", kind, "-p", f"{stem}.prob", given=given)
    columns = read.split("\0"), [text.removesuffix(_STOP) for text in chosen.split(_MARK)]
    # Behind the last text there is what the programs say at the end of the input.
    if any(len(column) <= len(texts) for column in columns):
        raise PackageError(
            f"{analyser.package}: {len(texts)} texts went in and {[len(c) for c in columns]} came "
            "out of lt-proc and apertium-tagger"
        )
    columns = columns[0][: len(texts)], columns[1][: len(texts)]
    return [parsed(text, *row) for text, *row in zip(texts, *columns, strict=True)]


def parsed(text: str, read: str, chosen: str) -> list[Word] | None:
    """The words of a text in Apertium's stream format.

    A contraction (del = de + el) is one word with the tag of its first part; of an entry of several
    words (in addition) each word is left without a label.

    Args:
        text: As it went in.
        read: From `lt-proc`: ^form/reading/reading$, ^form/*form$ where there is none.
        chosen: From `apertium-tagger -p`: ^form/reading$.

    Returns:
        The words; None where the streams do not match each other or the text.
    """
    units, choices = list(_UNIT.finditer(read)), list(_UNIT.finditer(chosen))
    if len(units) != len(choices):
        return None
    words: list[Word] = []
    end = 0
    for unit, choice in zip(units, choices, strict=True):
        words += _between(read[end : unit.start()])
        end = unit.end()
        form, *readings = _parts(unit[1])
        form_again, *one = _parts(choice[1])
        if form != form_again:
            return None
        pieces = _plain(form).split()
        if len(pieces) == 1 and one:
            found = {_upos(reading) for reading in readings}
            words.append(Word(pieces[0], _upos(one[0]), len(found) > 1))
        else:
            words += (Word(piece, UNKNOWN) for piece in pieces)
    words += _between(read[end:])
    whole = "".join(word.form for word in words)
    return words if whole == "".join(text.split()) else None


def _between(stream: str) -> Iterator[Word]:
    """What stands between units: signs that the lexicon has no letters for."""
    for piece in _plain(stream).split():
        yield Word(piece, UNKNOWN if any(map(str.isalnum, piece)) else PUNCTUATION)


def _parts(unit: str) -> list[str]:
    return _PART.findall(unit)


def _plain(stream: str) -> str:
    return re.sub(r"\\(.)", r"\1", stream)


def _upos(reading: str) -> str:
    """The part of speech of a reading, by the tags of its first part."""
    if reading.startswith("*") or not (tags := _TAGS.search(reading)):
        return UNKNOWN
    first, second = tags.groups()
    return UPOS.get(f"{first}.{second}", UPOS.get(first, UNKNOWN))
