"""Own data: files in the layouts of the papers' data sets become data sets and whole runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.transfer import own, papers
from sparse_ft.tasks.data import DataError, read


def put(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


def texts(folder, **languages):
    for code, text in languages.items():
        put(folder, f"text/{code}.txt", text)


def conllu(*sentences):
    """Sentences such as "the/DET/2/det cat/NOUN/0/root", as a treebank has them."""
    out = ""
    for number, sentence in enumerate(sentences, 1):
        words = [word.split("/") for word in sentence.split()]
        out += f"# sent_id = {number}\n# text = {' '.join(w[0] for w in words)}\n"
        for i, (form, upos, head, relation) in enumerate(words, 1):
            out += "\t".join(
                [str(i), form, form.lower(), upos, "_", "_", head, relation, "_", "SpaceAfter=No"]
            )
            out += "\n"
        out += "\n"
    return out


THE_CAT = "the/DET/2/det cat/NOUN/3/nsubj sees/VERB/0/root"
A_DOG = "a/DET/2/det dog/NOUN/3/nsubj hears/VERB/0/root"
A_BIRD = "the/DET/2/det bird/NOUN/0/root"
OLD = "old/ADJ/2/amod tree/NOUN/0/root"
SMALL = "small/ADJ/2/amod house/NOUN/0/root"
RED = "red/ADJ/2/amod river/NOUN/0/root:x"


@pytest.fixture
def treebanks(tmp_path):
    """Universal Dependencies as it is unpacked: two treebanks of Faroese, one of Maltese."""
    ud = tmp_path / "ud-treebanks-v2.7"
    en = "UD_English-EWT/en_ewt-ud-"
    put(ud, f"{en}train.conllu", conllu(THE_CAT, A_DOG, A_BIRD, OLD))
    put(ud, f"{en}dev.conllu", conllu(SMALL))
    put(ud, f"{en}test.conllu", conllu(A_BIRD))
    put(ud, "UD_Faroese-FarPaHC/fo_farpahc-ud-test.conllu", conllu(RED, RED))
    put(ud, "UD_Faroese-OFT/fo_oft-ud-test.conllu", conllu(SMALL))
    contraction = conllu(OLD).replace("1\told", "1-2\toldtree\t_\t_\t_\t_\t_\t_\t_\t_\n1\told")
    put(ud, "UD_Maltese-MUDT/mt_mudt-ud-test.conllu", contraction)
    put(ud, "UD_Manx-Cadhan/gv_cadhan-ud-test.conllu", conllu(RED))
    texts(
        tmp_path,
        en="the dog sees a cat\nsmallhouse\nThe  Bird\n",
        fo="old red\nred river\n",
        mt="a tree\n",
    )
    return tmp_path


@pytest.mark.parametrize("preset", ["pos", "dp"])
def test_treebanks(treebanks, preset):
    data = own.prepare(treebanks, preset, treebanks / "cache")
    assert (data.source, data.targets, data.development) == ("en", ("fo", "mt"), ())
    assert data.task == {"pos": "tokens", "dp": "parsing"}[preset]
    # The test sentence of English leaves its training data, those of all languages leave the text.
    train = read(data.train)
    assert [row["tokens"] for row in train] == [
        ["the", "cat", "sees"],
        ["a", "dog", "hears"],
    ]
    assert data.text["en"].read_text() == "the dog sees a cat\n"
    assert data.text["fo"].read_text() == "old red\n"
    assert data.text["mt"] == treebanks / "text" / "mt.txt"
    assert data.about["left out as twins"] == {"train": 2, "text en": 2, "text fo": 1}
    assert data.about["lines"] == {"en": 1, "fo": 1, "mt": 1}
    # Of two treebanks, the paper's.
    assert [row["tokens"] for row in read(data.test["fo"])] == [["red", "river"]] * 2
    (maltese,) = read(data.test["mt"])
    if preset == "pos":
        assert (maltese["tokens"], maltese["upos"]) == (["old", "tree"], ["ADJ", "NOUN"])
    else:
        assert (maltese["heads"], maltese["relations"]) == ([2, 0], ["amod", "root"])
    assert data.about["without text"] == ["gv"]
    assert own.prepare(treebanks, preset, treebanks / "cache") == data
    lines = "\n".join(own.describe(data))
    for said in ("from en to fo, mt", "test mt: 1 examples", "passed over, for want of text: gv"):
        assert said in lines


def test_data_sets_may_be_links(treebanks):
    folder = treebanks / "mine"
    folder.mkdir()
    for name in ("ud-treebanks-v2.7", "text"):
        (folder / name).symlink_to(treebanks / name)
    (folder / "ud-treebanks-v2.7" / "again").symlink_to(treebanks)  # a loop, and all of it twice
    put(folder, "ud-treebanks-v2.7/.git/mt_mudt-ud-test.conllu", "damaged")
    found = own.find(folder, "pos")
    assert found.targets == ("fo", "mt")
    assert found.paths["test"]["mt"].name == "mt_mudt-ud-test.conllu"


def test_text_that_was_moved_is_found_again(treebanks):
    own.prepare(treebanks, "pos", treebanks / "cache")
    moved = (treebanks / "text" / "mt.txt").rename(treebanks / "maltese.txt")
    data = own.prepare(treebanks, "pos", treebanks / "cache", text={"mt": moved})
    assert data.text["mt"] == moved


def test_a_language_of_two_treebanks_that_the_paper_has_not(treebanks):
    for bank in ("gsd", "hdt"):
        put(treebanks, f"UD_German-{bank.upper()}/de_{bank}-ud-test.conllu", conllu(RED))
    # Without text it is no target, whatever there is of it.
    assert "de" in own.prepare(treebanks, "pos", treebanks / "cache").about["without text"]
    texts(treebanks, de="a tree\n")
    with pytest.raises(DataError, match="de has 2 files for test: UD_German-GSD/de_gsd-ud-test"):
        own.find(treebanks, "pos")
    chosen = {"test": {"de": "UD_German-HDT/de_hdt-ud-test.conllu"}}
    put(treebanks, "transfer.json", json.dumps(chosen))
    assert own.find(treebanks, "pos").paths["test"]["de"] == treebanks / chosen["test"]["de"]


@pytest.fixture
def entities(tmp_path):
    """CoNLL-2003 as it was published (four columns, I- unless entities touch), and MasakhaNER."""
    put(
        tmp_path,
        "conll2003/eng.train",
        "-DOCSTART- -X- O O\n\nAnna NNP I-NP I-PER\nOmar NNP I-NP B-PER\nlikes VBZ I-VP O\n"
        "Lima NNP I-NP I-LOC\nOslo NNP I-NP I-ORG\n\n"
        "Omar NNP I-NP I-PER\nLima NNP I-NP I-PER\ntree NN I-NP I-MISC\n",
    )
    put(tmp_path, "conll2003/eng.testa", "-DOCSTART- -X- O O\n\nAnna NNP I-NP I-PER\nsees V O O\n")
    put(tmp_path, "conll2003/eng.testb", "Oslo NNP I-NP I-LOC\nnot RB O O\n")
    for code, day in (("hau", "B-DATE"), ("luo", "O")):
        put(
            tmp_path,
            f"masakhane-ner/data/{code}/test.txt",
            f"Omar B-PER\nLima I-PER\nhears O\nriver {day}\n\nOslo B-LOC\n. O\n",
        )
    texts(tmp_path, en="the old dog\n", hau="red bird\n", luo="green\n")
    return tmp_path


def test_entities(entities):
    data = own.prepare(entities, "ner", entities / "cache")
    assert data.targets == ("hau", "luo")
    first, second = read(data.train)
    # Entities that touch stay two; every entity begins with B-.
    assert first["tags"] == ["B-PER", "B-PER", "O", "B-LOC", "B-ORG"]
    # What one corpus has and the other lacks counts as none.
    assert second["tags"] == ["B-PER", "I-PER", "O"]
    assert read(data.test["hau"])[0]["tags"] == ["B-PER", "I-PER", "O", "O"]
    assert data.about["labels"] == {"B-LOC": 1, "B-ORG": 1, "B-PER": 3, "I-PER": 1, "O": 2}


XNLI = "language\tgold_label\tsentence1_binary_parse\tsentence1\tsentence2\tpairID\n"


@pytest.fixture
def pairs(tmp_path):
    """MultiNLI as XNLI has it, XNLI, and AmericasNLI with named columns and without."""
    put(
        tmp_path,
        "XNLI-MT-1.0/multinli/multinli.train.en.tsv",
        'premise\thypo\tlabel\nthe "old dog\tthe dog\tentailment\n'
        "a cat\tnot a cat\tcontradictory\na bird\ta red bird\tneutral\n",
    )
    put(
        tmp_path,
        "XNLI-1.0/xnli.dev.tsv",
        XNLI + "en\tneutral\t( )\ta tree\ta green tree\t1\nfr\tneutral\t( )\tun\tdeux\t1\n",
    )
    put(tmp_path, "XNLI-1.0/xnli.test.tsv", XNLI + "en\tentailment\t( )\ta house\ta house\t1\n")
    put(
        tmp_path,
        "AmericasNLI/test.tsv",
        "language\tpremise\thypothesis\tlabel\naym\tLima\tOslo\tcontradiction\n"
        "aym\tLima\tLima\tentailment\nquy\tOmar\tAnna\tneutral\n",
    )
    texts(tmp_path, en="the river\n", aym="red\nLIMA\n", quy="green\n")
    return tmp_path


def test_pairs(pairs):
    data = own.prepare(pairs, "nli", pairs / "cache")
    assert data.targets == ("aym", "quy")
    assert data.about["without text"] == []
    assert [row["label"] for row in read(data.train)] == ["entailment", "contradiction", "neutral"]
    assert read(data.train)[0]["premise"] == 'the "old dog'
    assert list(read(data.dev)) == [
        {"premise": "a tree", "hypothesis": "a green tree", "label": "neutral"}
    ]
    assert len(read(data.test["aym"])) == 2
    # Hypotheses of one premise are drawn together.
    assert data.groups["aym"].read_text() == "Lima\nLima\n"
    assert data.text["aym"].read_text() == "red\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test/aym.tsv", "aym\tLima\tOslo\tcontradiction\naym\tLima\tLima\tentailment\n"),
        ("anli_final/test/aym.tsv", "7\taym\tLima\tOslo\tcontradiction\n8\taym\ta\tb\tneutral\n"),
        ("test/aym.csv", 'premise,hypothesis,label\n"Lima, a",Oslo,neutral\na,b,entailment\n'),
    ],
)
def test_pairs_a_file_a_language(pairs, name, text):
    (pairs / "AmericasNLI" / "test.tsv").unlink()
    put(pairs, f"AmericasNLI/{name}", text)
    data = own.prepare(pairs, "nli", pairs / "cache")
    assert data.targets == ("aym",)
    assert len(read(data.test["aym"])) == 2


def test_multinli_as_published(pairs):
    (pairs / "XNLI-MT-1.0" / "multinli" / "multinli.train.en.tsv").unlink()
    rows = [
        {"gold_label": label, "sentence1": "a cat", "sentence2": f"a dog {label}", "genre": "x"}
        for label in ("neutral", "-", "entailment", "contradiction")
    ]
    put(pairs, "multinli_1.0/multinli_1.0_train.jsonl", "\n".join(map(json.dumps, rows)))
    data = own.prepare(pairs, "nli", pairs / "cache")
    # Pairs without a label of the majority are left out.
    labels = [row["label"] for row in read(data.train)]
    assert labels == ["neutral", "entailment", "contradiction"]


@pytest.fixture
def opinions(tmp_path):
    """SMSA without a line of names, and NusaX."""
    smsa = tmp_path / "indonlu" / "smsa_doc-sentiment-prosa"
    put(smsa, "train_preprocess.tsv", 'the "old dog\tpositive\na cat\tnegative\nred\tneutral\n')
    put(smsa, "valid_preprocess.tsv", "a bird\tpositive\n")
    nusax = tmp_path / "nusax" / "datasets" / "sentiment"
    for name in ("acehnese", "indonesian", "toba_batak"):
        put(nusax, f"{name}/train.csv", "id,text,label\n1,not this,neutral\n")
        put(nusax, f"{name}/test.csv", f'id,text,label\n5,"a, {name}",positive\n6,B,negative\n')
    texts(tmp_path, id="green\n", acehnese="river\nA, acehnese\n")
    return tmp_path


def test_opinions(opinions):
    data = own.prepare(opinions, "sentiment", opinions / "cache")
    assert (data.source, data.targets) == ("id", ("ace",))
    assert [row["text"] for row in read(data.train)] == ['the "old dog', "a cat", "red"]
    assert read(data.test["ace"])[0] == {"text": "a, acehnese", "label": "positive"}
    assert len(read(data.test["id"])) == 2
    # The sentences are parallel: a number is one sentence in all languages.
    assert data.groups["ace"].read_text() == data.groups["id"].read_text() == "5\n6\n"
    assert data.text["ace"].read_text() == "river\n"
    assert data.about["without text"] == ["bbc"]


def test_what_the_names_do_not_say(opinions):
    reviews = put(opinions, "reviews.csv", "text,label\nso,positive\nno,negative\nor,neutral\n")
    more = put(opinions, "elsewhere.txt", "tree\n")
    put(
        opinions,
        "transfer.json",
        json.dumps(
            {
                "source": "en",
                "development": ["ace"],
                "train": {"en": "reviews.csv"},
                "dev": {"en": "reviews.csv", "ace": "nusax/datasets/sentiment/acehnese/train.csv"},
                "text": {"en": "text/id.txt"},
            }
        ),
    )
    with pytest.raises(DataError, match="all examples are test or dev examples too"):
        own.prepare(opinions, "sentiment", opinions / "cache")
    put(opinions, "dev.csv", "text,label\nwell,positive\n")
    config = json.loads((opinions / "transfer.json").read_text())
    config["dev"]["en"] = "dev.csv"
    put(opinions, "transfer.json", json.dumps(config))
    data = own.prepare(opinions, "sentiment", opinions / "cache", text={"toba_batak": more})
    assert (data.source, data.targets, data.development) == ("en", ("bbc", "id"), ("ace",))
    assert list(data.dev_of) == ["ace"]
    assert data.about["files"]["train"] == {"en": str(reviews)}
    assert data.text["bbc"] == more


@pytest.mark.parametrize(
    ("fixture", "preset", "name", "old", "new", "message"),
    [
        ("treebanks", "dp", "fo_farpahc-ud-test.conllu", "\t2\tamod", "\t9\tamod",
         "fo_farpahc-ud-test.conllu, line 3: the head is '9'"),
        ("treebanks", "pos", "en_ewt-ud-dev.conllu", "\tsmall\t", "\tsmall ",
         "en_ewt-ud-dev.conllu, line 3: 9 column"),
        ("treebanks", "pos", "mt_mudt-ud-test.conllu", "NOUN", "NOWN",
         "mt_mudt-ud-test.conllu, line 4: the label 'NOWN' is not one of the training data's"),
        ("entities", "ner", "data/hau/test.txt", "hears O", "hears",
         "hau/test.txt, line 3: 1 column"),
        ("entities", "ner", "data/luo/test.txt", "I-PER", "I-ANIMAL",
         "luo/test.txt, line 1: the label 'B-ANIMAL' is not one"),
        ("pairs", "nli", "AmericasNLI/test.tsv", "Oslo\tcontradiction", "Oslo\tno",
         "test.tsv, line 2: the label is 'no'; it must be one of contradiction, entailment, n"),
        ("pairs", "nli", "xnli.dev.tsv", "a tree\ta green", "a tree a green",
         "xnli.dev.tsv, line 2: does not have the 6 fields"),
        ("opinions", "sentiment", "train_preprocess.tsv", "red\tneutral", "red",
         "train_preprocess.tsv, line 3: does not have the 2 fields of the columns text, label"),
        ("opinions", "sentiment", "acehnese/test.csv", "positive", "2",
         "acehnese/test.csv, line 2: the label is '2'"),
        ("opinions", "sentiment", "text/acehnese.txt", "river", "riv\udce9r",
         "acehnese.txt, line 1: is not UTF-8"),
    ],
)  # fmt: skip
def test_damage_is_named(request, fixture, preset, name, old, new, message):
    folder = request.getfixturevalue(fixture)
    (path,) = [p for p in folder.rglob("*") if p.as_posix().endswith(name)]
    text = path.read_text("utf-8")
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as error:
        own.prepare(folder, preset, folder / "cache")
    assert message in str(error.value)
    assert not (folder / "cache").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "text" / "id.txt").unlink(), "no text in id.*--text id=FILE"),
        (lambda f: (f / "text" / "acehnese.txt").unlink(), "no target: test data are in ace, bbc"),
        (lambda f: next(f.rglob("valid_pre*")).unlink(), "no dev file in the source language id"),
        (lambda f: put(f, "b/acehnese/test.csv", "x"), "ace has 2 files for test: b/acehnese/te"),
        (lambda f: put(f, "transfer.json", "{"), "transfer.json: is not JSON"),
        (lambda f: put(f, "transfer.json", '{"tests": {}}'), "there is no 'tests'"),
        (lambda f: put(f, "transfer.json", '{"text": ["a"]}'), "'text' must be language → file"),
        (lambda f: put(f, "transfer.json", '{"text": {"bbc": "a"}}'), "a: no such file"),
    ],
)
def test_what_is_missing_is_named(opinions, change, message):
    change(opinions)
    with pytest.raises(DataError, match=message):
        own.prepare(opinions, "sentiment", opinions / "cache")
    assert not (opinions / "cache").exists()


# --- whole runs ---------------------------------------------------------------------------------

SHORT = [
    *("density=0.2", "max_length=16", "language.steps=[2,2]", "language.evaluate_every=1"),
    *("task.steps=[3,3]", "task.evaluate_every=1", "held_out=0.5", "lr=1e-2", "batch_size=2"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    pytest.importorskip("transformers")
    from tiny_bases import bert_folder

    return bert_folder(tmp_path_factory.mktemp("model") / "base")


def command(*words):
    from typer.testing import CliRunner

    from benchmarks.transfer.__main__ import app

    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("fixture", "preset", "languages", "arms", "n"),
    [
        ("treebanks", "pos", ["fo", "mt"], ["task-only", "composed", "random"], [2, 1]),
        ("treebanks", "dp", ["fo", "mt"], ["task-only", "composed", "random"], [2, 1]),
        ("entities", "ner", ["hau", "luo"], ["task-only", "composed"], [2, 2]),
        ("pairs", "nli", ["aym", "quy"], ["task-only", "composed", "denoised"], [2, 1]),
        ("opinions", "sentiment", ["ace"], ["task-only", "composed", "denoised"], [2]),
    ],
)
def test_a_run(request, base, fixture, preset, languages, arms, n):
    if preset == "ner":
        pytest.importorskip("seqeval")
    folder = request.getfixturevalue(fixture)
    for path in (folder / "text").iterdir():
        path.write_text(path.read_text() + "the old dog sees\na small bird hears\n")
    words = ["own", folder, "--preset", preset, "--cache", folder / "cache", "--base", base]
    words += ["--device", "cpu", "--store", folder / "store.jsonl"]
    words += [word for setting in SHORT for word in ("--set", setting)]
    checked = command(*words, "--check")
    assert checked.exit_code == 0, checked.output
    assert f"from {own.PRESETS[preset].source} to {', '.join(languages)}" in checked.output
    assert not (folder / "cache" / "runs").exists()
    done = command(*words)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (folder / "store.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["part"] == "arms"]
    assert [(line["language"], line["arm"]) for line in lines] == [
        (language, arm) for language in languages for arm in arms
    ]
    assert [line["n"] for line in lines[:: len(arms)]] == n
    assert {(line["experiment"], line["size"], line["metric"]) for line in lines} == {
        (preset, "own", own.PRESETS[preset].metric)
    }
    recipes = lines[1]["settings"]["recipes"]
    assert recipes["task-lt"]["preset"] == own.PRESETS[preset].recipe
    assert recipes[f"{languages[0]}-lt"]["preset"] == "lt-sft-language"
    # The papers' figures stand beside ours.
    for line in lines:
        figure = papers.beside(preset, line["language"], line["arm"])
        assert figure is None or f" {100 * figure:.1f} " in done.output
    methods = {papers.ARMS[arm] for arm in arms}
    assert all(f"│ {method} (" in done.output for method in methods)


def test_the_papers_beside_many_languages():
    """Beyond six languages, they are rows."""
    from benchmarks.transfer.lines import Study
    from benchmarks.transfer.report import _published

    languages = ["ar", "bm", "fo", "gv", "mt", "sme", "xx"]
    line = {"experiment": "dp", "size": "own", "part": "arms", "metric": "las", "seed": 0}
    line |= {"arm": "composed", "counts": [[1, 2]]}
    table = _published(Study([line | {"language": language} for language in languages]))
    assert table.head[:3] == ["method (arm)", ">LT-SFT (composed)", ">RAND-SFT (random)"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["fo"][:3] == ["55.5", "53.1", "52.5"]
    assert {*rows["xx"]} == {""}
    assert rows["mean, as printed"][0] == "37.8"
    assert rows["where"][0] == (
        "LT-SFT (ACL 2022), appendix C, table 5b, bert-base-multilingual-cased, reduction factor 1"
    )


def test_the_commands_of_the_page(entities, treebanks):
    """docs/own-benchmark.md, each with --check: all options are there, all settings in range."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "own-benchmark.md").read_text("utf-8")
    lines = re.findall(r"^python -m benchmarks.transfer (own .*)$", page, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("FOLDER", str(entities)))
        found = command(*words, "--check", "--cache", entities / "cache")
        assert found.exit_code == 0, found.output
    (config,) = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    put(entities, "transfer.json", config)
    with pytest.raises(DataError, match="no text in swa"):
        own.find(entities, "ner")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "tagging"], "there is no 'tagging'"),
        (["--preset", "pos", "--set", "steps"], "is not NAME=VALUE"),
        (["--preset", "pos", "--set", "head.steps=1"], "neither language. nor task."),
        (["--preset", "pos", "--text", "fo"], "is not NAME=VALUE"),
    ],
)
def test_mistakes_in_a_command(tmp_path, words, message):
    pytest.importorskip("typer")
    found = command("own", tmp_path, "--cache", tmp_path / "cache", *words)
    assert found.exit_code == 2
    assert message in " ".join(found.output.replace("│", "").split())


def test_settings_are_the_papers():
    """LT-SFT, sections 4.2 and 4.3, tables 1 and 2."""
    for preset in own.PRESETS:
        chosen = own.settings(preset)
        assert (chosen.language.k, chosen.task.k) == (7_667_712, 14_155_776)
        assert chosen.language.l1 == (0.1, 0.1)
        assert chosen.language.decouple
        assert (chosen.language.evaluate_every, chosen.source.evaluate_every) == (1000, 5000)
    assert {p.base for p in own.PRESETS.values() if p.name in ("pos", "dp", "ner")} == {
        "bert-base-multilingual-cased"
    }
    assert own.PRESETS["nli"].base == "xlm-roberta-base"
    assert own.settings("pos").task.epochs == (3, 10)
    assert own.settings("nli").task.batch_size == 32
    # Footnote 5: 0.25 % to 8 % of mBERT, 0.16 % to 5.1 % of XLM-R.
    assert [round(100 * d, 2) for d in own.settings("pos").ladder] == [
        *(0.25, 0.5, 1.0, 2.0, 3.99, 7.99)
    ]
    assert round(100 * own.settings("nli").ladder[0], 2) == 0.16
    assert round(100 * own.settings("nli").ladder[-1], 1) == 5.1


# --- the papers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("table", papers.TABLES, ids=lambda t: f"{t.task}-{t.metric}-{t.where}")
def test_means_are_as_printed(table):
    """The mean of a column's rows is the average that the paper prints under it."""
    assert all(len(row) == len(table.methods) for row in table.rows.values())
    printed = table.rows.get(papers.MEAN)
    rows = [row for language, row in table.rows.items() if language != papers.MEAN]
    if printed is None or not rows:
        return
    for column, mean in enumerate(printed):
        exact = sum(row[column] for row in rows) / len(rows)
        assert abs(exact - mean) < 0.0501, (table.methods[column], exact, mean)


def test_beside():
    assert papers.beside("pos", "mt", "composed") == 0.806
    assert papers.beside("pos", "mt", "task-only") == 0.326
    assert papers.beside("dp", "sme", "random") == 0.296
    assert papers.beside("dp", "sme", "random", "uas") == 0.499
    assert papers.beside("ner", papers.MEAN, "MAD-X") == 0.699
    assert papers.beside("nli", papers.MEAN, "composed") == 0.514
    assert papers.beside("nli", papers.MEAN, "denoised") == 0.513
    assert papers.beside("sentiment", "min", "composed") == 0.82
    # No random tickets for entities, no figures for a language of the user's own.
    assert papers.beside("ner", "hau", "random") is None
    assert papers.beside("pos", "xx", "composed") is None
    assert papers.beside("mine", "mt", "composed") is None
    # Each paper's runs of a method are rows of their own: 51.3 is to be read against 51.0.
    assert papers.beside("nli", papers.MEAN, "LT-SFT in DeFT-X") == 0.51
    assert papers.where("sentiment", "LT-SFT") == (
        "cambridgeltl/composable-sft, MODELS.md, one source, xlm-roberta-base"
    )
    assert papers.where("nli", "DeFT-X") == (
        "DeFT-X (EMNLP Findings 2025), as a summary gives it, xlm-roberta-base (second-hand)"
    )


def test_no_two_tables_have_a_figure_of_one_thing():
    said = [
        (table.task, table.metric, method, language)
        for table in papers.TABLES
        for method in table.methods
        for language in table.rows
    ]
    assert len({*said}) == len(said)


def test_tables_are_of_the_presets():
    assert {table.task for table in papers.TABLES} == {*own.PRESETS}
    for table in papers.TABLES:
        assert table.base == own.PRESETS[table.task].base
