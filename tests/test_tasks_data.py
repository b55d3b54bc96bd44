"""Readers of data: what each format says, and errors that name the file and the line."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.tasks import data
from sparse_ft.tasks.data import DataError, Examples, held_out


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


def test_text(write):
    # U+2028 and U+0085 are characters of text, not ends of lines.
    path = write("a.txt", "\ufeffone\r\n\r\n  two\u2028three \n\x85\nfour")
    examples = data.read(path)
    assert [e["text"] for e in examples] == ["one", "two\u2028three", "four"]
    assert examples.source == str(path)


CONLL = """-DOCSTART- O

EU\tB-ORG
said O

# O
New York\tB-LOC


"""


def test_conll(write):
    examples = data.read(write("a.conll", CONLL))
    assert [(e["tokens"], e["tags"]) for e in examples] == [
        (["EU", "said"], ["B-ORG", "O"]),
        (["#", "New York"], ["O", "B-LOC"]),
    ]
    assert examples.lines == [3, 6]
    assert examples.where(1).endswith("a.conll, line 6")
    # MasakhaNER's files are called .txt; CoNLL-2003 has four columns.
    assert data.read(write("a.txt", CONLL), plain="conll") == examples
    four = data.read(write("b.conll", "U.N. NNP I-NP I-ORG\nofficial NN I-NP O"))
    assert four[0]["tags"] == ["I-ORG", "O"]
    assert data.read_conll(write("b.conll", "a X B\nb Y C"), token=1, tag=0)[0] == {
        "tokens": ["X", "Y"],
        "tags": ["a", "b"],
    }
    # Neither a no-break space nor one of Chinese ends a column or a sentence.
    spaces = data.read(write("c.conll", "1\u00a0000  O\n\u3000 O\n \t\nPeter\tB-PER\n"))
    assert [e["tokens"] for e in spaces] == [["1\u00a0000", "\u3000"], ["Peter"]]


CONLLU = """# sent_id = 1
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\t_\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj:x\t_\t_
2.1\tgone\t_\t_\t_\t_\t_\t_\t_\t_

# sent_id = 2
1\tsí\tsí\t_\t_\t_\t_\t_\t_\t_
"""


def test_conllu(write):
    path = write("a.conllu", CONLLU)
    examples = data.read(path)
    assert examples.lines == [3, 8]
    assert list(examples) == [
        {
            "tokens": ["vamos", "nos"],
            "upos": ["VERB", "PRON"],
            "heads": [0, 1],
            "relations": ["root", "obj:x"],
        },
        {"tokens": ["sí"]},
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1\tvamos\tir", "1 vamos ir", "line 3: 8 column"),
        ("2\tnos", "3\tnos", "line 4: the word's ID is '3'; 2 comes next"),
        ("\t1\tobj", "\t3\tobj", "line 4: the head is '3'; a sentence of 2 words"),
        ("\t1\tobj", "\t_\tobj", "line 4: the head is '_'"),
    ],
)
def test_malformed_conllu(write, old, new, message):
    path = write("a.conllu", CONLLU.replace(old, new))
    with pytest.raises(DataError, match=message) as caught:
        data.read(path)
    assert str(caught.value).startswith(str(path))


def test_json_lines(write):
    path = write("a.jsonl", '{"text": "a\u2028b", "label": 1}\n\n{"text": "c"}')
    examples = data.read(path)
    assert list(examples) == [{"text": "a\u2028b", "label": 1}, {"text": "c"}]
    assert examples.lines == [1, 3]


def test_csv(write):
    path = write("a.csv", 'text,label\n"one, ""two""\nthree",x\nfour,y\n')
    examples = data.read(path)
    assert list(examples) == [
        {"text": 'one, "two"\nthree', "label": "x"},
        {"text": "four", "label": "y"},
    ]
    assert examples.lines == [3, 4]
    long = "w" * 200_000
    assert data.read(write("b.tsv", f"text\tlabel\n{long}\tx"))[0]["text"] == long
    # A column may have any name.
    assert list(data.read(write("c.csv", "line,label\na,b"))) == [{"line": "a", "label": "b"}]


def test_a_table_whose_first_line_is_a_row(write):
    path = write("a.tsv", "so good\tpos\nso bad\tneg\n")
    rows = data.read(path, columns=["text", "label"])
    assert list(rows) == [
        {"text": "so good", "label": "pos"},
        {"text": "so bad", "label": "neg"},
    ]
    assert rows.where(0) == f"{path}, line 1"
    with pytest.raises(data.DataError, match="line 1: does not have the 3 fields of the columns"):
        data.read(path, columns=["id", "text", "label"])
    with pytest.raises(data.DataError, match="columns is 'text,label'; it must be a list such as"):
        data.read(path, columns="text,label")


def test_a_quotation_mark_in_a_tsv_file_is_text(write):
    path = write("a.tsv", 'text\tlabel\n"so\tpos\n"I" said\tneg\nok"\tpos\n')
    assert texts(data.read(path)) == ['"so', '"I" said', 'ok"']
    quoted = write("b.tsv", 'text\tlabel\n"a\tb"\tpos\n')
    assert texts(data.read(quoted, quoting=True)) == ["a\tb"]
    with pytest.raises(DataError, match="line 2: does not have the 2 fields"):
        data.read(quoted)


def test_an_option_of_another_format(write):
    path = write("a.txt", "a O")
    with pytest.raises(TypeError, match="the format text takes no argument 'token'; it takes none"):
        data.read(path, token=1)
    with pytest.raises(TypeError, match="conll takes no argument 'x'; it takes token, tag"):
        data.read(path, plain="conll", x=1)


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "in Rome",
                    "qas": [
                        {
                            "id": "q",
                            "question": "where?",
                            "answers": [{"text": "Rome", "answer_start": 3}],
                        }
                    ],
                }
            ],
        }
    ],
}


def test_squad(write):
    assert list(data.read(write("a.json", json.dumps(SQUAD)))) == [
        {
            "id": "q",
            "context": "in Rome",
            "question": "where?",
            "answers": {"text": ["Rome"], "answer_start": [3]},
        }
    ]
    assert list(data.read(write("b.json", '[{"text": "a"}]'))) == [{"text": "a"}]
    del SQUAD["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"]
    with pytest.raises(DataError, match=r"c\.json: is not SQuAD.*KeyError: 'answer_start'"):
        data.read(write("c.json", json.dumps(SQUAD)))


@pytest.mark.parametrize("name", ["a.txt", "a.conll", "a.conllu", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_files(write, name, content):
    path = write(name, content)
    with pytest.raises(DataError, match=r"holds no|is not JSON") as caught:
        data.read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("name", ["a.txt", "a.conll", "a.conllu", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_wrong_encoding_names_line_and_byte(write, name, mark):
    path = write(name, mark + b"first\nse\xe9cond")
    with pytest.raises(DataError, match="UTF-8") as caught:
        data.read(path)
    assert f"{path}, line 2: byte {8 + len(mark)} (0xe9)" in str(caught.value)
    with pytest.raises(DataError, match=r"line 1: byte 0 \(0xff\)"):
        data.read(write(name, "text".encode("utf-16")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "EU B\nsaid\n", "line 2: 1 column"),
        ("a.conll", "EU\t\n", "line 1: the token or its tag is empty"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: is not JSON"),
        ("a.jsonl", "[1]", "line 1: must be a JSON object"),
        ("a.json", "3", "must be a list of objects"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: does not have the 2 fields"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: does not have the 2 fields"),
        ("a.csv", 'a,b\n"1,2\n', ": unexpected end"),
        ("a.csv", "a,b,a\n1,2,3\n", "line 1: two columns have the name 'a'"),
        ("a.conll", "a O\rb O\r", "line 1: holds a carriage return"),
        ("a.conllu", "1\ta\r\r", "line 1: holds a carriage return"),
        ("a.xyz", "a", "the suffix '.xyz' says nothing"),
    ],
)
def test_malformed_files(write, name, content, message):
    path = write(name, content)
    with pytest.raises(DataError, match=message) as caught:
        data.read(path)
    assert str(caught.value).startswith(str(path))


def test_missing(tmp_path):
    for name in ("none.conll", "none.txt", "a/b/c"):
        with pytest.raises(DataError, match="no such file or folder"):
            data.read(tmp_path / name)
    with pytest.raises(DataError, match="no such file or folder"):
        data.read("none.csv")
    with pytest.raises(DataError, match="format is 'conl'; it must be one of text, conll"):
        data.read("x", format="conl")
    with pytest.raises(DataError, match=r"Permission denied|Is a directory"):
        data.read_text(tmp_path)


def test_folder_of_splits(write, tmp_path):
    write("ud/en_ewt-ud-train.conllu", CONLLU)
    write("ud/en_ewt-ud-dev.conllu", CONLLU.partition("\n\n")[0])
    write("ud/LICENSE.txt", "free")
    write("ud/notes.md", "test")
    assert len(data.read(tmp_path / "ud", split="train")) == 2
    assert len(data.read(tmp_path / "ud", split="validation")) == 1
    assert len(data.read(tmp_path / "ud", split="dev")) == 1
    with pytest.raises(DataError, match="no files are named after the split 'test'"):
        data.read(tmp_path / "ud", split="test")
    with pytest.raises(DataError, match="say which split"):
        data.read(tmp_path / "ud")
    write("ud/fr-dev.conllu", CONLLU)
    with pytest.raises(DataError, match=r"2 files are named after .*fr-dev\.conllu"):
        data.read(tmp_path / "ud", split="dev")


def test_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    tags = datasets.ClassLabel(names=["O", "B-PER"])
    try:
        sequence = datasets.List(tags)
    except AttributeError:  # before datasets 4
        sequence = datasets.Sequence(tags)
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "tags": sequence,
            "label": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    rows = {"tokens": [["Anna", "ran"], ["so"]], "tags": [[1, 0], [0]], "label": [1, -1]}
    one = datasets.Dataset.from_dict(rows, features=features)
    wanted = [
        {"tokens": ["Anna", "ran"], "tags": ["B-PER", "O"], "label": "good"},
        {"tokens": ["so"], "tags": ["O"], "label": None},
    ]
    one.save_to_disk(tmp_path / "one")
    assert list(data.read(tmp_path / "one")) == wanted
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    examples = data.read(tmp_path / "two", split="test")
    assert list(examples) == wanted[1:]
    assert examples.source == f"{tmp_path / 'two'} (test)"
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        data.read(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match="has no split None"):
        data.read(tmp_path / "two")
    one.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="no data set that can be read"):
        data.read(tmp_path / "none")


def test_hub_out_of_reach():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"sparse-ft-tests/none: no such file .*save_to_disk"):
        data.read("sparse-ft-tests/none", split="train")


def texts(examples):
    return [example["text"] for example in examples]


@given(
    st.lists(st.text(max_size=3), min_size=2).filter(lambda rows: len(set(rows)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_held_out(rows, share, seed, shuffled):
    examples = Examples(({"text": t} for t in rows), "f.txt", range(len(rows)))
    train, valid = held_out(examples, share, seed)
    assert train
    assert valid
    assert train.source == valid.source == "f.txt"
    assert sorted(texts(train) + texts(valid)) == sorted(rows)
    assert not {*texts(train)} & {*texts(valid)}
    assert valid.lines == sorted(valid.lines)
    assert [rows[i] for i in valid.lines] == texts(valid)
    most = max(rows.count(text) for text in rows)
    assert len(valid) <= max(most, share * len(rows))
    other = list(examples)
    shuffled.shuffle(other)
    assert {*texts(held_out(other, share, seed)[1])} == {*texts(valid)}


def test_held_out_is_of_the_share_and_of_the_seed():
    examples = Examples({"text": str(i)} for i in range(1000))
    valid = held_out(examples, 0.05)[1]
    assert len(valid) == 50
    assert texts(valid) == texts(held_out(examples, 0.05)[1])
    assert texts(valid) != texts(held_out(examples, 0.05, seed=1)[1])
    # A growing corpus keeps what is trained on and what is held out apart for most of it.
    grown = [*examples, *({"text": f"more {i}"} for i in range(10))]
    random.Random(0).shuffle(grown)
    assert len({*texts(valid)} & {*texts(held_out(grown, 0.05)[1])}) >= 45
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="share must lie between 0 and 1"):
            held_out(examples, share)
    with pytest.raises(DataError, match="two different examples"):
        held_out(Examples([{"text": "a"}] * 5), 0.5)
