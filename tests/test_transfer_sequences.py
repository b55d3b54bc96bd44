"""Intents and topics for transfer: labels, parts, and that nothing held out is trained on."""

import json
import os
import re
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.transfer import intents, items, mediawiki, topics
from benchmarks.transfer.dataset import Dataset
from benchmarks.transfer.items import Item
from benchmarks.transfer.mediawiki import Message, split
from benchmarks.transfer.packages import PackageError, Packages
from benchmarks.transfer.twins import identity, keys_path, twins

CORE = "languages/i18n"


class Trees:
    """Packages that lie in folders of a test."""

    def __init__(self, root):
        self.root = root

    def get(self, name):
        return self.root / name

    def about(self, names):
        return {name: {"version": "0"} for name in names}


def write_messages(root, language, texts, folder=CORE):
    path = root / "mediawiki/usr/share/mediawiki" / folder / f"{language}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"@metadata": {}, **texts}), encoding="utf-8")


def keys_of(part, prefix, count=3):
    """The first keys with a prefix that belong to a part."""
    found = (f"{prefix}-{i}" for i in range(1000))
    return list(islice((key for key in found if split(key) == part), count))


def lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def rows(path):
    return [json.loads(line) for line in lines(path)]


# --- items --------------------------------------------------------------------------------------


def test_items_read_differently_and_have_one_label(tmp_path):
    some = [
        Item("a", "Delete the page", "deletion"),
        Item("b", "delete the page!", "deletion"),
        Item("c", "Show more", "changes"),
        Item("d", "show more", "media"),
    ]
    assert items.distinct(some) == some[:1]
    path = items.write_items(tmp_path / "new" / "x.jsonl", some)
    assert rows(path) == [{"text": i.text, "label": i.label} for i in some]
    assert lines(keys_path(path)) == ["a", "b", "c", "d"]


# --- topics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "key", "topic"),
    [
        (CORE, "undeletepagetext", "deletion"),
        (CORE, "filedelete-intro", "deletion"),
        (CORE, "filehist-help", "media"),
        (CORE, "right-delete", "rights"),
        (CORE, "rightslogtext", "rights"),
        (CORE, "userlogin-noaccount", "account"),
        (CORE, "rcfilters-filter-bots-label", "changes"),
        (CORE, "tog-watchdefault", "changes"),
        (CORE, "tog-underline", None),
        (CORE, "mainpage", None),
        ("languages/i18n/exif", "exif-software", "exif"),
        ("includes/installer/i18n", "config-title", "installer"),
        ("includes/api/i18n", "delete-summary", None),
        ("extensions-core/AbuseFilter/i18n", "abusefilter-log", "abusefilter"),
        ("extensions-core/AbuseFilter/i18n/api", "abusefilter-log", None),
        ("extensions-core/VisualEditor/i18n/ve-mw", "visualeditor-help", "editor"),
        ("extensions-core/VisualEditor/i18n/ve-mw/api", "visualeditor-help", None),
        ("extensions-core/Cite/i18n", "cite-desc", None),
        ("extensions-core/Cite/modules/ve-cite/i18n", "cite-ve-title", "editor"),
    ],
)
def test_what_messages_are_about(folder, key, topic):
    assert topics.topic(Message(key, folder, "any")) == topic


def test_short_messages_have_no_label():
    key = keys_of("dev", "delete", 1)[0]
    texts = ["Delete it", "Delete it now"]
    found = [topics.items([Message(key, CORE, text)], "dev") for text in texts]
    assert [len(some) for some in found] == [0, 1]


def test_no_language_is_in_two_roles():
    assert len({*topics.TARGETS}) == len(topics.TARGETS) >= 30
    for module in (topics, intents):
        assert not {*module.TARGETS} & {*module.DEVELOPMENT, *module.STAGE0}


def say(language, topic, key):
    """A message that is near no other: two words are the key's, and two the language's."""
    return f"{language} {topic} text in {language} {key} of {key}"


@pytest.fixture
def wiki(tmp_path):
    """Messages in English and three languages, the same keys in all."""
    keys = {
        (topic, part): keys_of(part, prefix)
        for topic, prefix in (("deletion", "delete"), ("media", "upload"), (None, "other"))
        for part in ("train", "dev", "test")
    }
    for language in ("en", "xx", "yy", "zz"):
        texts = {
            key: say(language, topic, key) for (topic, _), some in keys.items() for key in some
        }
        write_messages(tmp_path, language, texts)
    return tmp_path, keys


def build_topics(root, name="built"):
    languages = {"targets": ["xx"], "development": ["yy"], "stage0": ["en", "zz"]}
    return topics.build(root / name, Trees(root), **languages)


def test_topics(wiki):
    root, keys = wiki
    made = build_topics(root)
    assert (made.source, made.targets, made.development) == ("en", ("xx",), ("yy",))
    wanted = [(say("en", t, k), t) for t in ("deletion", "media") for k in keys[t, "train"]]
    assert sorted((row["text"], row["label"]) for row in rows(made.train)) == sorted(wanted)
    for language in ("en", "xx", "yy"):
        wanted = [key for topic in ("deletion", "media") for key in keys[topic, "test"]]
        assert sorted(lines(made.groups[language])) == sorted(wanted)
        assert [row["text"][:2] for row in rows(made.test[language])] == [language] * 6
    assert made.dev_of == {"yy": made.test["yy"]}
    # Without a topic, a message is not held out, whatever its part.
    free = [key for (topic, part), some in keys.items() if topic is None or part == "train"
            for key in some]  # fmt: skip
    for language, path in [*made.text.items(), ("zz", made.stage0[1])]:
        assert sorted(line.split()[-1] for line in lines(path)) == sorted(free), language
        assert lines(keys_path(path)) == [line.split()[-1] for line in lines(path)]
    assert Dataset.load(root / "built").content == made.content
    assert build_topics(root, "again").content == made.content


def test_what_reads_like_a_held_out_message_is_not_trained_on(wiki):
    root, keys = wiki
    path = root / "mediawiki/usr/share/mediawiki" / CORE
    held, free = keys["media", "test"][0], keys[None, "train"][0]
    labelled = keys["deletion", "train"][0]
    english = json.loads((path / "en.json").read_text())
    other = json.loads((path / "zz.json").read_text())
    # Keys with the English text of a test message, and a text of stage 0 that one has in a target.
    english[labelled] = english[held].upper() + "!"
    english[keys["media", "dev"][1]] = english[held]
    other[free] = say("xx", "media", held)
    # One that differs from a test message in a word, though its key is free.
    near = keys[None, "train"][1]
    other[near] = say("xx", "media", held).replace("text", "page")
    write_messages(root, "en", english)
    write_messages(root, "zz", other)
    mediawiki.messages.cache_clear()
    mediawiki._texts.cache_clear()
    made = build_topics(root)
    assert labelled not in lines(keys_path(made.train))
    assert keys["media", "dev"][1] not in lines(keys_path(made.dev))
    assert not any(labelled in line for path in made.text.values() for line in lines(path))
    assert other[free] not in lines(made.stage0[1])
    assert other[near] not in lines(made.stage0[1])
    assert any(near in line for line in lines(made.text["xx"]))
    assert any(free in line for line in lines(made.text["xx"]))


@pytest.mark.parametrize("what", ["text", "key"])
def test_a_planted_twin_is_found(wiki, monkeypatch, what):
    """By its text; and by its key alone, where another language says it in other words."""
    root, _ = wiki
    held = topics._held

    def forgetful(found):
        if what == "text":
            return set(), set()
        return set(), held({code: some for code, some in found.items() if code != "zz"})[1]

    monkeypatch.setattr(topics, "_held", forgetful)
    with pytest.raises(AssertionError, match=r"topics: .* held-out items are trained on"):
        build_topics(root)
    assert not (root / "built" / "manifest.json").exists()


def test_each_two_targets_are_each_others_wrong_language(packages, tmp_path):
    """With about as much text, as what is compared is the language and not the amount."""
    few = {"development": [], "stage0": ["en"]}
    made = topics.build(tmp_path, packages, targets=topics.TARGETS[:14], **few)
    words = [made.about["counts"][code]["text"]["words"] for code in made.targets]
    for one, other in zip(words[::2], words[1::2], strict=True):
        assert max(one, other) < 1.5 * min(one, other)


# --- intents ------------------------------------------------------------------------------------

ON, OFF, VOID = "HassTurnOn", "HassTurnOff", "HassNevermind"


def write_templates(root, code, templates, rules=()):
    path = root / "home-assistant-intents/data" / f"{code}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "intents": {i: {"data": [{"sentences": some}]} for i, some in templates.items()},
        "lists": {"level": {"range": {"from": 1, "to": 9}}},
        "expansion_rules": dict(rules),
    }
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def home(tmp_path):
    """Ten templates of two intents in English, three in two other languages."""
    verbs = ["start", "light", "warm", "open", "run", "wake", "fire", "boot", "lift", "power"]
    english = {
        ON: [f"{verb} [the] {{name}} <now>" for verb in verbs],
        OFF: [f"un{verb} (the|my) {{name}} to {{level}}" for verb in verbs],
        VOID: ["forget it", "never mind"],
    }
    write_templates(tmp_path, "en", english, [("now", "(now|at once|please)")])
    for code in ("xx", "yy"):
        some = {
            intent: [f"{code} {intent} {i} [so] {{area}} {{level}}" for i in range(4)]
            for intent in (ON, OFF)
        }
        write_templates(tmp_path, code, some)
    for code in ("en", "xx", "yy", "zz"):
        texts = {f"key-{i}": f"{code} message number {i}" for i in range(20)}
        write_messages(tmp_path, code, texts)
    return tmp_path


def build_intents(root, name="built"):
    languages = {"targets": ["xx"], "development": ["yy"], "stage0": ["en", "zz"]}
    return intents.build(root / name, Trees(root), **languages)


def test_intents(home):
    made = build_intents(home)
    assert made.task == "sequences"
    assert made.targets == ("xx",)
    for path in (made.train, made.dev, *made.test.values()):
        assert {row["label"] for row in rows(path)} == {ON, OFF}
    parts = [{*lines(keys_path(path))} for path in (made.train, made.dev, made.test["en"])]
    assert [len(part) for part in parts] == [14, 2, 4]  # 7, 1 and 2 of 10, twice
    assert len(set().union(*parts)) == 20
    # All templates of other languages are tested.
    assert len({*lines(made.groups["xx"])}) == len({*lines(made.groups["yy"])}) == 8
    assert len(lines(made.text["xx"])) == 20 == len(lines(made.stage0[1]))
    assert build_intents(home, "again").content == made.content


def test_sentences_are_limited_by_intent_and_template(home):
    made = build_intents(home)
    for path, (per_intent, per_template) in ((made.train, intents.TRAIN), (made.dev, intents.TEST)):
        labels, keys = [row["label"] for row in rows(path)], lines(keys_path(path))
        assert max(map(labels.count, labels)) <= per_intent
        assert max(map(keys.count, keys)) <= per_template


def test_sentences_with_other_names_are_twins(home):
    """Each of ten templates has a skeleton that all have, and one of its own."""
    templates = [f"wake {{name}} [{word}]" for word in "abcdefghij"]
    others = [f"stop {{name}} {word}" for word in "abcdefghij"]
    write_templates(home, "en", {ON: templates, OFF: others})
    made = build_intents(home)

    def shared(path):
        return [row for row in rows(path) if re.fullmatch(r"wake \w+", row["text"])]

    assert shared(made.test["en"])
    assert not shared(made.dev)
    assert not shared(made.train)
    assert len({*lines(keys_path(made.train))}) == 14


def test_messages_that_read_like_a_sentence_are_left_out(home):
    held = rows(build_intents(home).test["xx"])[0]["text"]
    write_messages(home, "yy", {"key-1": held.upper() + ".", "key-2": "quite another one"})
    mediawiki.messages.cache_clear()
    mediawiki._texts.cache_clear()
    made = build_intents(home, "again")
    assert lines(made.text["yy"]) == ["quite another one"]
    assert twins(made) == []


# --- the packages themselves --------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages():
    folder = Path(os.environ.get("SPARSE_FT_TRANSFER", ".transfer"))
    there = Packages(folder / "packages", download=False)
    try:
        there.about(["mediawiki", "home-assistant-intents"])
    except PackageError as error:
        pytest.skip(str(error))
    return there


def test_topics_of_mediawiki(packages, tmp_path):
    made = topics.build(tmp_path, packages, targets=["se"], development=["vep"], stage0=["en"])
    found = made.about["counts"]
    assert set(found["en"]["train"]["labels"]) == {rule.topic for rule in topics.RULES}
    assert min(found["en"]["train"]["labels"].values()) > 50
    assert found["se"]["test"]["examples"] == len(lines(made.groups["se"])) > 300
    assert twins(made) == []
    keys = {split(key) for key in lines(made.groups["se"])}
    assert keys == {"test"}


def test_intents_of_home_assistant(packages, tmp_path):
    made = intents.build(tmp_path, packages, targets=["lb"], development=["cy"], stage0=["en"])
    found = made.about["counts"]
    for language, part in (("en", "train"), ("en", "test"), ("lb", "test")):
        assert set(found[language][part]["labels"]) == {*intents.INTENTS}
    assert found["lb"]["test"]["examples"] > 500
    assert found["lb"]["test"]["keys"] > 150
    text = {identity(line) for line in lines(made.text["lb"])}
    assert not text & {identity(row["text"]) for row in rows(made.test["lb"])}
