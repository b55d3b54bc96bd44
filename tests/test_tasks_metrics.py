"""Metrics against closed forms, scikit-learn and the rules of the published scripts."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ft.tasks.metrics import accuracy, attachment, entity_f1, macro_f1, squad

LABELS = st.sampled_from(["a", "b", "c", "d"])


@given(st.lists(st.tuples(LABELS, LABELS), min_size=1))
@settings(deadline=None)
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, gold = (list(column) for column in zip(*pairs, strict=True))
    assert accuracy(predicted, gold) == pytest.approx(sklearn.accuracy_score(gold, predicted))
    wanted = sklearn.f1_score(gold, predicted, average="macro", zero_division=0)
    assert macro_f1(predicted, gold) == pytest.approx(wanted, abs=1e-12)
    labels = ["a", "b", "e"]
    wanted = sklearn.f1_score(gold, predicted, labels=labels, average="macro", zero_division=0)
    assert macro_f1(predicted, gold, labels) == pytest.approx(wanted, abs=1e-12)


def test_macro_f1_by_hand():
    # a: TP 1, FP 1, FN 0 → 2/3; b: TP 1, FP 0, FN 1 → 2/3; c: FN 0, FP 0, absent
    assert macro_f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(2 / 3)
    assert macro_f1(["a"], ["b"]) == 0


GOLD = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]


@pytest.mark.parametrize(
    ("predicted", "scores"),
    [
        (GOLD, (1, 1, 1)),
        ([["O"] * 4, ["O"] * 2], (0, 0, 0)),
        # One entity cut short is both a false one and a missed one.
        ([["B-PER", "O", "O", "B-LOC"], ["O", "B-ORG"]], (2 / 3, 2 / 3, 2 / 3)),
        # The right span of the wrong type is wrong.
        ([["B-PER", "I-PER", "O", "B-ORG"], ["O", "O"]], (1 / 2, 1 / 3, 2 / 5)),
    ],
)
def test_entity_f1_by_hand(predicted, scores):
    found = entity_f1(predicted, GOLD)
    assert [found[key] for key in ("precision", "recall", "f1")] == pytest.approx(scores)


def test_entity_schemes_differ_on_what_is_not_well_formed():
    # conlleval takes an I- without its B- for an entity, IOB2 does not; IOB1 begins entities so.
    predicted, gold = [["I-PER", "I-PER", "O"]], [["B-PER", "I-PER", "O"]]
    assert entity_f1(predicted, gold)["f1"] == 1
    assert entity_f1(predicted, gold, "IOB2")["f1"] == 0
    assert entity_f1(predicted, [["I-PER", "I-PER", "O"]], "IOB1")["f1"] == 1
    assert entity_f1([["S-PER", "O"]], [["S-PER", "O"]], "IOBES")["f1"] == 1


@pytest.mark.parametrize("tag", ["E-PER", "S-PER", "L-PER", "U-PER"])
def test_tags_of_another_scheme_need_its_name(tag):
    for predicted, gold in (("B-PER", tag), (tag, "B-PER")):
        with pytest.raises(ValueError, match=rf"'{tag}' is not of B-, I- and O.* IOBES .* BILOU"):
            entity_f1([[predicted]], [[gold]])
    scheme = {"E": "IOE2", "S": "IOBES"}.get(tag[0], "BILOU")
    assert entity_f1([[tag]], [[tag]], scheme)["f1"] == (tag[0] != "L")


def spans(tags):
    """Entities of well-formed IOB2 tags, read off by hand."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and not tag.startswith("I-"):
            found.add((tags[start][2:], start, i))
            start = None
        if tag.startswith("B-"):
            start = i
    return found


@st.composite
def iob2(draw, length):
    tags = []
    for _ in range(length):
        options = ["O", "B-X", "B-Y"]
        if tags and tags[-1] != "O":
            options.append(f"I-{tags[-1][2:]}")
        tags.append(draw(st.sampled_from(options)))
    return tags


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(iob2(n), iob2(n))))
@settings(deadline=None)
def test_entity_f1_counts_spans(pair):
    predicted, gold = pair
    said, true = spans(predicted), spans(gold)
    wanted = 2 * len(said & true) / (len(said) + len(true)) if said | true else 0
    for scheme in (None, "IOB2"):
        assert entity_f1([predicted], [gold], scheme)["f1"] == pytest.approx(wanted)


def test_entity_f1_without_seqeval(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval", None)
    with pytest.raises(ModuleNotFoundError, match=r"sparse-ft\[tasks\]"):
        entity_f1(GOLD, GOLD)


@pytest.mark.parametrize(
    ("predicted", "gold", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("an  apple", ["apple", "pear"], 1, 1),
        ("Theatre", ["atre"], 0, 0),
        ("in the year 1999", ["1999"], 0, 2 / 4),  # "in", "year" beside it: P 1/3, R 1
        ("a b c", ["b d", "c b x"], 0, 2 * 2 / 5),  # the article goes: {b, c} against {c, b, x}
        ("x x", ["x"], 0, 2 / 3),  # each word counts as often as both have it
        ("U.S.", ["us"], 1, 1),
        ("", ["a"], 1, 0),  # both are empty once the article is gone
        ("no", ["yes"], 0, 0),
    ],
)
def test_squad_by_hand(predicted, gold, exact, f1):
    found = squad({"q": predicted}, {"q": gold})
    assert found == pytest.approx({"exact_match": exact, "f1": f1})


def test_squad_takes_means_and_counts_what_is_missing():
    gold = {"q": ["x"], "r": ["y z"], "s": ["w"]}
    found = squad({"q": "x", "r": "y"}, gold)
    assert found == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3) / 3})
    with pytest.raises(ValueError, match="'q' has no correct answer"):
        squad({}, {"q": []})
    with pytest.raises(ValueError, match="no questions"):
        squad({}, {})


def test_attachment_by_hand():
    gold = [[0, 1, 1], [2, 0]], [["root", "obj", "punct"], ["det", "root"]]
    found = attachment([[0, 1, 2], [2, 0]], [["root", "iobj", "punct"], ["det", "root"]], *gold)
    assert found == {"uas": 4 / 5, "las": 3 / 5}
    counted = [[True, True, False], [False, False]]
    found = attachment([[0, 1, 2], [2, 0]], [["root"] * 3, ["root"] * 2], *gold, counted)
    assert found == {"uas": 1, "las": 1 / 2}
    with pytest.raises(ValueError, match="no word counts"):
        attachment(*gold, *gold, [[False] * 3, [False] * 2])
    with pytest.raises(ValueError, match="sentence 0 has 3 words, 2 predicted"):
        attachment([[0, 1]], [["root", "obj"]], gold[0][:1], gold[1][:1])


@pytest.mark.parametrize("metric", [accuracy, macro_f1, entity_f1])
def test_nothing_to_score(metric):
    with pytest.raises(ValueError, match="nothing to score"):
        metric([], [])
    with pytest.raises(ValueError, match="1 items, but 2 predictions"):
        metric([["a"], ["b"]], [["a"]])
    with pytest.raises(ValueError, match="scheme is 'BIO'; it must be one of IOB1"):
        entity_f1(GOLD, GOLD, "BIO")
    with pytest.raises(ValueError, match="sentence 0 has 4 tags, 1 predicted"):
        entity_f1([["O"], ["O", "O"]], GOLD)
