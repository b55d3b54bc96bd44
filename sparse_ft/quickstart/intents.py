"""Home Assistant intents as cross-lingual data: template grammar, sampler, splits by template.

A sentence has two labels: its intent, and a tag for each word that says which slot it fills.

Each language of the package `home-assistant-intents` has hand-written sentence templates for
intents that bear the same name in every language::

    turn on [the] (lights|lamps) in {area}          <rule> stands for another template
    (a;b) or [a;b]                                  both, in either order
    {list:slot}                                     a value of a list, a number of a range

A template belongs to one split, and a sentence is dropped from training when its skeleton (the
sentence with slot names in place of slot values) occurs in a test split, so no test sentence has
a twin in training.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import permutations
from pathlib import Path
from typing import Any, TypeAlias

from .e5 import QuickstartError, package_folder

REQUIREMENT = "home-assistant-intents==2026.10.27"

NAMES: Mapping[str, tuple[str, ...]] = {
    "area": ("Atrium", "Studio", "Loft", "Patio", "Salon", "Lobby", "Foyer", "Veranda"),
    "name": ("Nova", "Orion", "Luna", "Mira", "Vega", "Zeta", "Lyra", "Atlas"),
    "floor": ("Alpha", "Beta", "Gamma", "Delta"),
}
"""Values of the slots that a household fills itself: names that belong to no one language."""


class TemplateError(ValueError):
    """A template that does not follow the grammar."""


@dataclass(frozen=True)
class Text:
    """Literal text."""

    text: str


@dataclass(frozen=True)
class Slot:
    """`{list}` or `{list:slot}`."""

    name: str


@dataclass(frozen=True)
class Rule:
    """`<rule>`."""

    name: str


@dataclass(frozen=True)
class Joined:
    """Parts one after another."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Permutation:
    """All parts, in any order, a space between them."""

    parts: tuple[Node, ...]


Node: TypeAlias = Text | Slot | Rule | Joined | Choice | Permutation

_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


@cache
def parse(template: str) -> Node:
    """Parse one template.

    Args:
        template: text in the grammar described at the top of this module.

    Returns:
        Its syntax tree.

    Raises:
        TemplateError: brackets do not match.
    """
    node, end = _parse_group(template, 0, "")
    if end != len(template):
        raise TemplateError(f"{template!r}: unexpected {template[end]!r} at {end}")
    return node


def _parse_group(text: str, at: int, closing: str) -> tuple[Node, int]:
    """Parse up to `closing` (or the end): alternatives of permutations of sequences."""
    alternatives: list[list[list[Node]]] = [[[]]]
    literal = ""

    def flush() -> None:
        nonlocal literal
        if literal:
            alternatives[-1][-1].append(Text(literal))
            literal = ""

    while at < len(text) and text[at] != closing:
        c = text[at]
        if c == "\\" and at + 1 < len(text):
            literal += text[at + 1]
            at += 2
        elif c in "([":
            flush()
            inner, end = _parse_group(text, at + 1, _CLOSING[c])
            if end >= len(text):
                raise TemplateError(f"{text!r}: {c!r} at {at} is never closed")
            alternatives[-1][-1].append(inner if c == "(" else Choice((inner, Text(""))))
            at = end + 1
        elif c in "{<":
            flush()
            end = text.find(_CLOSING[c], at)
            if end < 0:
                raise TemplateError(f"{text!r}: {c!r} at {at} is never closed")
            name = text[at + 1 : end].strip()
            alternatives[-1][-1].append(Slot(name.split(":")[0]) if c == "{" else Rule(name))
            at = end + 1
        elif c in ")]}>":
            raise TemplateError(f"{text!r}: {c!r} at {at} closes nothing")
        else:
            if c in "|;":
                flush()
                if c == "|":
                    alternatives.append([[]])
                else:
                    alternatives[-1].append([])
            else:
                literal += c
            at += 1
    flush()
    options = [_permutation([_sequence(parts) for parts in option]) for option in alternatives]
    return (options[0] if len(options) == 1 else Choice(tuple(options))), at


def _sequence(parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Joined(tuple(parts))


def _permutation(parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Permutation(tuple(parts))


@dataclass(frozen=True)
class Sentence:
    """One expansion of a template.

    Attributes:
        text: the sentence.
        skeleton: the same with `{slot}` for slot values, lower case; equal skeletons are twins.
        intent: the label.
        template: the template it came from.
        tags: of each word of the text, "O", "B-slot" (a slot's value begins) or "I-slot" (goes on).
    """

    text: str
    skeleton: str
    intent: str
    template: str
    tags: tuple[str, ...]


_Pieces: TypeAlias = list[tuple[str, str | None]]
"""Text in pieces, each with the slot whose value it is."""


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _tags(pieces: _Pieces) -> tuple[str, ...]:
    """A tag for each word. What touches a value has its tag: `50%`, `d'Luna` are one word each."""
    owners = [i for i, (text, _) in enumerate(pieces) for _ in text]
    tags: list[str] = []
    last = None
    for word in re.finditer(r"\S+", "".join(text for text, _ in pieces)):
        slots = [i for i in owners[word.start() : word.end()] if pieces[i][1] is not None]
        here = slots[0] if slots else None
        tags.append("O" if here is None else f"{'I' if here == last else 'B'}-{pieces[here][1]}")
        last = here
    return tuple(tags)


class Language:
    """The templates of one language.

    Args:
        code: the language's code in `home-assistant-intents`, such as ``lb``.
        data: the content of its file, read from the installed package when None.

    Raises:
        QuickstartError: the package is not installed or has no such language.
    """

    def __init__(self, code: str, data: Mapping[str, Any] | None = None) -> None:
        self.code = code
        self.data = _load(code) if data is None else data
        self.rules = {k: parse(v) for k, v in self.data.get("expansion_rules", {}).items()}
        self.lists: Mapping[str, Any] = self.data.get("lists", {})

    @cached_property
    def templates(self) -> dict[str, list[str]]:
        """Templates of each intent that can be expanded: every list known, no free text."""
        out: dict[str, list[str]] = {}
        for intent, content in sorted(self.data["intents"].items()):
            texts = [_tidy(t) for block in content["data"] for t in block["sentences"]]
            usable = [t for t in dict.fromkeys(texts) if self._closed(parse(t))]
            if usable:
                out[intent] = usable
        return out

    def _closed(self, node: Node, depth: int = 0) -> bool:
        match node:
            case Slot(name):
                free = self.lists.get(name, {"wildcard": True}).get("wildcard")
                return name in NAMES or not free
            case Rule(name):
                return (
                    name in self.rules and depth < 20 and self._closed(self.rules[name], depth + 1)
                )
            case Choice(options):
                return all(self._closed(o, depth) for o in options)
            case Joined(parts) | Permutation(parts):
                return all(self._closed(p, depth) for p in parts)
        return True

    def sample(self, intent: str, template: str, rng: random.Random) -> Sentence:
        """Expand a template at random.

        Args:
            intent: the label the sentence gets.
            template: one of `templates[intent]`.
            rng: the source of choices, each uniform.
        """
        pieces = self._expand(parse(template), rng)
        text = _tidy("".join(text for text, _ in pieces))
        skeleton = _tidy("".join(text if slot is None else f"{{{slot}}}" for text, slot in pieces))
        return Sentence(text, skeleton.lower(), intent, template, _tags(pieces))

    def _expand(self, node: Node, rng: random.Random) -> _Pieces:
        match node:
            case Text(text):
                return [(text, None)]
            case Rule(name):
                return self._expand(self.rules[name], rng)
            case Slot(name):
                return [(self._value(name, rng), name)]
            case Choice(options):
                return self._expand(rng.choice(options), rng)
            case Joined(parts):
                return [piece for part in parts for piece in self._expand(part, rng)]
            case Permutation(parts):
                order = list(parts)
                rng.shuffle(order)
                pieces: _Pieces = []
                for part in order:
                    pieces += [*self._expand(part, rng), (" ", None)]
                return pieces[:-1]
        raise TypeError(f"not a template node: {node!r}")

    def _value(self, name: str, rng: random.Random) -> str:
        if name in NAMES:
            return rng.choice(NAMES[name])
        content = self.lists[name]
        if "range" in content:
            span = content["range"]
            return str(rng.randrange(span["from"], span["to"] + 1, span.get("step", 1)))
        value = rng.choice(content["values"])
        text = value if isinstance(value, str) else value["in"]
        return "".join(part for part, _ in self._expand(parse(text), rng))


def expansions(node: Node, rules: Mapping[str, Node] | None = None) -> Iterator[str]:
    """Yield every expansion of a template, slots left as `{slot}`; for small templates.

    Args:
        node: a parsed template.
        rules: the trees of the rules it uses.
    """
    match node:
        case Text(text):
            yield text
        case Slot(name):
            yield "{" + name + "}"
        case Rule(name):
            yield from expansions((rules or {})[name], rules)
        case Choice(options):
            for option in options:
                yield from expansions(option, rules)
        case Joined(parts):
            if not parts:
                yield ""
                return
            for first in expansions(parts[0], rules):
                for rest in expansions(Joined(parts[1:]), rules):
                    yield first + rest
        case Permutation(parts):
            for order in permutations(parts):
                spaced: list[Node] = []
                for part in order:
                    spaced += [part, Text(" ")]
                yield from expansions(Joined(tuple(spaced[:-1])), rules)


def _load(code: str) -> Mapping[str, Any]:
    folder = package_folder("home_assistant_intents", REQUIREMENT) / "data"
    path: Path = folder / f"{code}.json"
    if not re.fullmatch(r"[A-Za-z-]+", code) or not path.is_file():
        known = " ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise QuickstartError(f"home-assistant-intents has no language {code!r}; it has: {known}")
    data: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def split_templates(
    templates: Mapping[str, Sequence[str]], shares: Mapping[str, float]
) -> dict[str, dict[str, list[str]]]:
    """Give each template of each intent to one split, by a hash of its text.

    The split depends on the templates alone, so it is the same for every seed and every run.

    Args:
        templates: intent -> templates.
        shares: split -> share, summing to 1; the first split comes first when there is too little
            for all, and the last one gets at least one template of an intent that has two.

    Returns:
        split -> intent -> templates.
    """
    out: dict[str, dict[str, list[str]]] = {s: {} for s in shares}
    names = list(shares)
    for intent, texts in sorted(templates.items()):
        order = sorted(set(texts), key=lambda t: hashlib.sha256(f"{intent}\0{t}".encode()).digest())
        counts = [int(shares[s] * len(order)) for s in names]
        counts[0] = max(counts[0], min(1, len(order)))
        counts[-1] = max(counts[-1], min(1, len(order) - 1))
        counts[0] += len(order) - sum(counts)
        at = 0
        for name, count in zip(names, counts, strict=True):
            if count > 0:
                out[name][intent] = order[at : at + count]
                at += count
    return out


def sample_split(
    language: Language,
    templates: Mapping[str, Sequence[str]],
    per_intent: int,
    per_template: int,
    rng: random.Random,
) -> list[Sentence]:
    """Draw different sentences from the templates of a split.

    Args:
        language: whose templates they are.
        templates: intent -> templates of the split.
        per_intent: at most this many sentences of an intent.
        per_template: at most this many sentences of a template.
        rng: the source of choices.

    Returns:
        Sentences with different texts, grouped by intent.
    """
    out: dict[str, Sentence] = {}
    for intent, texts in sorted(templates.items()):
        drawn = dict.fromkeys(texts, 0)
        found = 0
        for _ in range(3 * per_template):
            for template in texts:
                if found >= per_intent or drawn[template] >= per_template:
                    continue
                sentence = language.sample(intent, template, rng)
                if sentence.text not in out:
                    out[sentence.text] = sentence
                    drawn[template] += 1
                    found += 1
    return list(out.values())


def without_twins(sentences: Sequence[Sentence], held_out: Sequence[Sentence]) -> list[Sentence]:
    """Drop the sentences whose skeleton occurs in the held-out ones."""
    skeletons = {s.skeleton for s in held_out}
    return [s for s in sentences if s.skeleton not in skeletons]


def made_up_names(count: int) -> list[str]:
    """Different names of two or three syllables that belong to no language, the same every time."""
    rng = random.Random("names")
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = range(rng.choice((2, 3)))
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in syllables)
        names[word.capitalize()] = None
    return list(names)


def rename(
    sentences: Sequence[Sentence], names: Sequence[str], rng: random.Random
) -> list[Sentence]:
    """Put other names into the slots that a household fills itself.

    One name may fill any of these slots, so that only the context tells which.

    Args:
        sentences: sentences with `NAMES`.
        names: what to put in place of those.
        rng: the source of choices.
    """
    out = []
    for sentence in sentences:
        words = sentence.text.split()
        for i, tag in enumerate(sentence.tags):
            for value in NAMES.get(tag[2:], ()):
                if value in words[i]:
                    words[i] = words[i].replace(value, rng.choice(names))
                    break
        out.append(replace(sentence, text=" ".join(words)))
    return out


def without_ambiguous(sentences: Sequence[Sentence]) -> list[Sentence]:
    """Drop the sentences whose skeleton was drawn under more than one intent."""
    intents: dict[str, set[str]] = {}
    for s in sentences:
        intents.setdefault(s.skeleton, set()).add(s.intent)
    return [s for s in sentences if len(intents[s.skeleton]) == 1]


@dataclass(frozen=True)
class Sizes:
    """How many sentences are drawn."""

    train_per_intent: int = 120
    train_per_template: int = 40
    test_per_intent: int = 100
    test_per_template: int = 20
    unlabelled: int = 4000


@dataclass(frozen=True)
class Corpus:
    """Everything the quickstart reads.

    Attributes:
        intents: the labels: intents with two usable templates or more in source and target.
        source: English sentences, split -> sentences ("train", "dev", "test").
        target: sentences of the target language's test templates.
        renamed: the sentences of `source["train"]`, `source["test"]` and `target` with made-up
            names, under "train", "source" and "target"; no name of "train" is in the others.
        unlabelled: language -> texts from the templates that are not held out.
        languages: target and control language codes.
    """

    intents: tuple[str, ...]
    source: Mapping[str, list[Sentence]]
    target: list[Sentence]
    renamed: Mapping[str, list[Sentence]]
    unlabelled: Mapping[str, list[str]]
    languages: tuple[str, str]

    @property
    def texts(self) -> list[str]:
        """All texts, each once."""
        labelled = [*self.source["train"], *self.source["dev"], *self.source["test"], *self.target]
        labelled += [s for sentences in self.renamed.values() for s in sentences]
        free = [text for texts in self.unlabelled.values() for text in texts]
        return list(dict.fromkeys([s.text for s in labelled] + free))


SOURCE = "en"
SOURCE_SHARES: Mapping[str, float] = {"train": 0.7, "dev": 0.1, "test": 0.2}
OTHER_SHARES: Mapping[str, float] = {"train": 0.5, "test": 0.5}


def build_corpus(
    target: str, control: str, helpers: Sequence[str] = (), sizes: Sizes | None = None
) -> Corpus:
    """Draw the quickstart's data; the same every time.

    English is split 70:10:20 by template, every other language 50:50. Labels are used of English
    alone; the text of the training templates of all languages is used unlabelled.

    Args:
        target: language to transfer to.
        control: language whose SFT serves as a control.
        helpers: further languages whose unlabelled text is drawn.
        sizes: how many sentences to draw.

    Raises:
        QuickstartError: a language is not there, or shares too few intents with English.
    """
    sizes = sizes or Sizes()
    codes = list(dict.fromkeys([SOURCE, target, control, *helpers]))
    languages = {code: Language(code) for code in codes}
    splits = {
        code: split_templates(language.templates, SOURCE_SHARES if code == SOURCE else OTHER_SHARES)
        for code, language in languages.items()
    }
    ours, theirs = languages[SOURCE].templates, languages[target].templates
    intents = tuple(i for i in sorted(theirs) if len(theirs[i]) > 1 and len(ours.get(i, ())) > 1)
    if len(intents) < 3:
        raise QuickstartError(
            f"language {target!r} shares {len(intents)} intents of two templates or more with "
            f"{SOURCE!r}; the quickstart needs 3. Try lb, cy, is, ga, af or eu"
        )

    def held_out(code: str, split: str, per_intent: int, per_template: int) -> list[Sentence]:
        rng = random.Random(f"{code} {split}")
        templates = splits[code].get(split, {})
        return without_ambiguous(
            sample_split(languages[code], templates, per_intent, per_template, rng)
        )

    test = {code: held_out(code, "test", sizes.test_per_intent, sizes.test_per_template)
            for code in codes}  # fmt: skip
    dev = held_out(SOURCE, "dev", sizes.test_per_intent, sizes.test_per_template)
    secret = [s for sentences in test.values() for s in sentences]

    def labelled(sentences: Sequence[Sentence]) -> list[Sentence]:
        return [s for s in sentences if s.intent in intents]

    dev = without_twins(dev, secret)
    train = sample_split(
        languages[SOURCE], splits[SOURCE]["train"], sizes.train_per_intent,
        sizes.train_per_template, random.Random(f"{SOURCE} train"),
    )  # fmt: skip
    train = without_twins(without_ambiguous(train), [*secret, *dev])
    unlabelled: dict[str, list[str]] = {}
    for code in codes:
        rng = random.Random(f"{code} unlabelled")
        templates = splits[code]["train"]
        per_template = max(1, 2 * sizes.unlabelled // sum(map(len, templates.values())))
        drawn = sample_split(languages[code], templates, 10**9, per_template, rng)
        texts = [s.text for s in without_twins(drawn, [*secret, *dev])]
        rng.shuffle(texts)
        unlabelled[code] = texts[: sizes.unlabelled]
    source = {"train": labelled(train), "dev": labelled(dev), "test": labelled(test[SOURCE])}
    tested = labelled(test[target])
    names = made_up_names(90)
    renamed = {
        "train": rename(source["train"], names[:60], random.Random("train names")),
        "source": rename(source["test"], names[60:], random.Random("source names")),
        "target": rename(tested, names[60:], random.Random("target names")),
    }
    return Corpus(intents, source, tested, renamed, unlabelled, (target, control))
