"""Figures of the papers, to print beside ours.

LT-SFT (Ansell et al., ACL 2022) is copied from its appendix C, table 5, and its table 2; the
figures of its authors' repository (cambridgeltl/composable-sft, MODELS.md) from there. DeFT-X
(Simon & Jyothi, EMNLP Findings 2025) was not at hand: its means are as a summary of it gives them,
and marked as second-hand. The papers print percentages; here they are shares, as our scores are.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARMS", "MEAN", "TABLES", "Figures", "beside", "methods", "where"]

MEAN = "mean"
"""In the place of a language: the mean over a table's languages, as printed."""
ARMS = {
    "task-only": "LT-SFT TA-only",
    "composed": "LT-SFT",
    "random": "RAND-SFT",
    "denoised": "DeFT-X",
}
"""Our arms → the methods of the papers."""


@dataclass(frozen=True)
class Figures:
    """A table of a paper: one metric of one task.

    Attributes:
        task: "pos", "dp", "ner", "nli" or "sentiment".
        metric: "accuracy", "uas", "las" or "f1".
        where: The paper, and the table in it.
        base: The pretrained model, as the Hub names it.
        methods: What the columns are.
        factors: For each column, the reduction factor of the adapters that its task tuning has as
            many parameters as: that of six whose mean over these figures, of test data, was best
            (table 2); none where it is not told.
        rows: Language, or `MEAN` → percentages, one a column.
        second_hand: Are they from a summary, and not from the paper?
    """

    task: str
    metric: str
    where: str
    base: str
    methods: tuple[str, ...]
    factors: tuple[int, ...]
    rows: dict[str, tuple[float, ...]]
    second_hand: bool = False


def _rows(text: str, part: int = 0) -> dict[str, tuple[float, ...]]:
    """Rows such as "ar 70.8/53.6 69.5/51.5"; part: of figures that stand together."""
    split = (line.split() for line in text.strip().splitlines())
    return {
        language: tuple(float(figure.split("/")[part]) for figure in figures)
        for language, *figures in split
    }


_LT_SFT = "LT-SFT (ACL 2022), appendix C, table {}"
_MBERT, _XLMR = "bert-base-multilingual-cased", "xlm-roberta-base"
_WITH_RANDOM = ("LT-SFT", "RAND-SFT", "MAD-X", "LT-SFT TA-only", "MAD-X TA-only")
_WITHOUT = ("LT-SFT", "MAD-X", "LT-SFT TA-only", "MAD-X TA-only")
_POS = """
ar 68.7 69.3 70.1 70.6 70.8
bm 57.0 55.6 51.0 34.2 37.2
bxr 73.2 71.4 71.9 59.5 62.0
fo 87.9 86.5 85.7 72.9 74.1
gv 72.0 68.4 66.9 35.4 37.5
hsb 83.1 82.4 81.8 69.2 69.6
ja 53.9 54.3 51.1 54.1 51.2
kpv 61.8 56.0 58.5 37.1 35.8
mt 80.6 77.6 73.7 32.6 30.9
myv 80.3 71.5 75.6 45.7 48.5
olo 82.3 81.7 79.7 62.2 63.4
sa 65.3 63.2 60.9 39.8 45.0
sme 78.0 70.4 72.0 43.3 39.4
ug 59.1 64.7 63.7 34.0 36.8
yue 66.8 65.6 66.8 64.5 64.1
zh 67.5 68.0 67.6 65.9 67.6
mean 71.1 69.2 68.6 51.3 52.1
"""
_DP = """
ar 70.8/53.6 68.7/51.6 69.5/51.5 68.7/53.0 68.6/52.3
bm 43.1/16.5 39.3/14.8 39.1/13.6 30.0/7.8 29.9/6.8
bxr 49.2/25.9 48.3/24.1 48.3/24.0 40.7/17.3 41.0/18.0
fo 68.2/55.5 65.7/53.1 66.3/52.5 54.3/39.8 53.6/38.5
gv 60.0/42.4 59.0/39.1 61.2/37.0 28.1/5.0 26.4/5.4
hsb 73.7/60.5 72.1/58.7 72.1/61.1 55.4/42.1 53.5/40.9
ja 36.9/19.7 34.8/18.9 33.0/18.9 36.0/19.3 33.8/18.3
kpv 50.5/27.2 45.1/20.7 47.3/22.6 24.7/7.5 25.4/7.1
mt 74.6/55.4 68.9/48.8 69.4/50.8 29.2/5.7 28.9/5.0
myv 65.9/45.3 59.8/36.3 59.6/35.7 32.1/11.7 30.3/10.4
olo 66.4/47.8 64.5/43.1 60.9/42.0 42.2/20.0 42.5/18.3
sa 49.5/25.2 48.9/20.8 46.8/19.5 32.5/8.7 36.0/9.9
sme 58.0/42.1 49.9/29.6 50.6/29.0 23.2/7.0 22.3/6.6
ug 36.4/16.7 37.3/15.8 42.1/19.2 21.9/7.7 23.5/8.4
yue 51.1/34.0 48.7/31.2 48.8/31.8 47.4/30.0 47.0/29.4
zh 59.8/37.0 58.2/35.6 58.5/37.2 58.4/36.3 59.1/36.9
mean 57.1/37.8 54.3/33.9 54.6/34.1 39.1/19.9 38.9/19.5
"""
_NER = """
hau 83.5 83.4 46.5 44.0
ibo 76.7 71.7 56.8 54.5
kin 67.4 65.3 52.9 50.2
lug 67.9 67.0 53.8 53.3
luo 54.7 52.2 37.7 33.0
pcm 74.6 72.1 74.4 71.0
swa 79.4 77.6 69.5 69.6
wol 66.3 65.6 37.1 29.8
yor 74.8 74.0 69.3 66.6
mean 71.7 69.9 55.3 52.4
"""
_NLI = """
aym 57.9 51.6 38.3 40.7
bzd 44.4 44.0 37.1 38.3
cni 47.9 47.6 40.9 44.1
gn 63.5 58.8 44.8 43.3
hch 42.9 41.5 38.4 40.7
nah 52.7 53.7 41.6 44.2
oto 48.5 46.8 39.7 40.8
quy 62.0 58.3 38.3 41.5
shp 50.3 48.9 42.1 44.4
tar 43.5 43.9 37.6 38.8
mean 51.4 49.5 39.9 41.7
"""
# Three languages had no text to learn from there, and are the task's SFT alone.
_NUSAX = """
ace 79.7
ban 82.0
bjn 82.2
en 88.5
id 89.7
jv 84.2
mad 76.7
min 82.0
su 85.8
"""
_NUSAX_TASK_ONLY = """
bbc 38.7
bug 29.6
nij 68.0
"""
_REPOSITORY = "cambridgeltl/composable-sft, MODELS.md, one source"
_SUMMARY = "DeFT-X (EMNLP Findings 2025), as a summary gives it"
# Its own runs of the other methods, which are other figures than those papers'.
_IN_DEFT_X = ("LT-SFT in DeFT-X", "MAD-X in DeFT-X", "DeFT-X")

TABLES = (
    Figures(
        "pos", "accuracy", _LT_SFT.format("5a"), _MBERT, _WITH_RANDOM, (1, 1, 16, 32, 32),
        _rows(_POS),
    ),
    Figures(
        "dp", "las", _LT_SFT.format("5b"), _MBERT, _WITH_RANDOM, (1, 1, 1, 1, 1), _rows(_DP, 1)
    ),
    Figures(
        "dp", "uas", _LT_SFT.format("5b"), _MBERT, _WITH_RANDOM, (1, 1, 2, 1, 1), _rows(_DP, 0)
    ),
    Figures("ner", "f1", _LT_SFT.format("5c"), _MBERT, _WITHOUT, (1, 8, 8, 32), _rows(_NER)),
    Figures("nli", "accuracy", _LT_SFT.format("5d"), _XLMR, _WITHOUT, (1, 2, 4, 4), _rows(_NLI)),
    Figures("sentiment", "f1", _REPOSITORY, _XLMR, ("LT-SFT",), (), _rows(_NUSAX)),
    Figures(
        "sentiment", "f1", _REPOSITORY, _XLMR, ("LT-SFT TA-only",), (), _rows(_NUSAX_TASK_ONLY)
    ),
    Figures(
        "sentiment", "f1", _SUMMARY, _XLMR, _IN_DEFT_X, (), {MEAN: (80.2, 75.8, 81.4)},
        second_hand=True,
    ),
    Figures(
        "nli", "accuracy", _SUMMARY, _XLMR, _IN_DEFT_X, (), {MEAN: (51.0, 49.5, 51.3)},
        second_hand=True,
    ),
)  # fmt: skip
"""All tables. No two have a figure of one method, language and metric."""


def beside(task: str, language: str, arm: str, metric: str | None = None) -> float | None:
    """The papers' figure for one of ours.

    Args:
        task: "pos", "dp", "ner", "nli" or "sentiment".
        language: A code as the paper writes it, or `MEAN`.
        arm: An arm of ours, or a method of a paper, such as "MAD-X".
        metric: "uas" for the unlabelled score of parsing; default: the task's own.

    Returns:
        A share between 0 and 1; None where the papers have none.
    """
    method = ARMS.get(arm, arm)
    for table in TABLES:
        if table.task != task or method not in table.methods or language not in table.rows:
            continue
        if metric in (None, table.metric):
            return round(table.rows[language][table.methods.index(method)] / 100, 4)
    return None


def methods(task: str) -> list[str]:
    """The methods that the papers have figures of for a task."""
    return list(dict.fromkeys(x for t in TABLES if t.task == task for x in t.methods))


def where(task: str, method: str, metric: str | None = None) -> str:
    """The tables that `beside` takes a method's figures from, with all that limits them."""
    found = []
    for table in TABLES:
        if table.task != task or method not in table.methods or metric not in (None, table.metric):
            continue
        said = f"{table.where}, {table.base}"
        if table.factors:
            said += f", reduction factor {table.factors[table.methods.index(method)]}"
        found.append(said + (" (second-hand)" if table.second_hand else ""))
    return "; ".join(found)
