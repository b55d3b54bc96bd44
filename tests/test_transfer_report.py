"""The tables of the transfer benchmark say what its lines say, and its page what the stored say."""

import json
import math

import numpy as np
import pytest
import transfer_lines as made
from rich.console import Console

from benchmarks.transfer import lines, papers, report, scores
from benchmarks.transfer.scores import Difference


def written(path, found):
    path.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    return path


def study(found):
    (one,) = lines.studies(found)
    return one


def cells(table):
    """Row name → column → cell."""
    head = [name.removeprefix(">") for name in table.head]
    return {row[0]: dict(zip(head, row, strict=True)) for row in table.rows}


def table_of(found, start):
    return next(table for table in report.tables(study(found)) if table.title.startswith(start))


def test_page_and_plots_are_what_the_stored_lines_give():
    assert report.faults(lines.stored()) == []


def test_scores_and_differences_of_a_table():
    found = made.arms()
    rows = cells(table_of(found, "Accuracy"))
    assert list(rows) == list(made.RIGHT)
    for arm, row in rows.items():
        each = {
            x: [line["score"] for line in found if (line.get("arm"), line["language"]) == (arm, x)]
            for x in ("frp", "an")
        }
        assert row["frp"] == f"{100 * np.mean(each['frp']):.1f}"
        assert row["mean"] == f"{100 * np.mean([*each['frp'], *each['an']]):.1f}"
        assert row["seeds"] == "3"
    assert rows["task-only"]["− task-only"] == rows["composed"]["− composed"] == ""
    counts = {
        arm: {
            x: [
                np.array(line["counts"])
                for line in found
                if (line.get("arm"), line["language"]) == (arm, x)
            ]
            for x in ("an", "frp")
        }
        for arm in ("composed", "task-only")
    }
    groups = {line["language"]: line["groups"] for line in found if line["part"] == "groups"}
    wanted = scores.pooled("accuracy", counts["composed"], counts["task-only"], groups)
    assert rows["composed"]["− task-only"] == report.interval(wanted)
    one = [x["frp"] for x in (counts["composed"], counts["task-only"], groups)]
    claims = cells(table_of(found, "Claims"))
    wanted = report.interval(scores.difference("accuracy", *one))
    assert claims["composed > task-only"]["frp"] == f"{wanted} holds"


@pytest.mark.parametrize(
    ("found", "says", "shown"),
    [
        ((0.036, 0.021, 0.05), "holds", "+3.6 [+2.1, +5.0]"),
        ((-0.016, -0.03, -0.002), "does not hold", "−1.6 [−3.0, −0.2]"),
        ((0.004, -0.011, 0.02), "undecided", "+0.4 [−1.1, +2.0]"),
        ((0.0001, 0.0, 0.0002), "undecided", "0.0 [0.0, 0.0]"),
        ((-0.0001, -0.0002, 0.0), "undecided", "0.0 [0.0, 0.0]"),
        ((0.0, 0.0, 0.0), "the same", "0.0 [0.0, 0.0]"),
    ],
)
def test_verdicts(found, says, shown):
    three, one = Difference(*found, 3), Difference(*found, 1)
    assert report.verdict(three) == says
    assert report.interval(three) == shown
    assert report.stated(three) == f"{shown} {says}"
    # An interval of one seed knows of no other; what is the same is the same.
    assert report.stated(one) == f"{shown} {says}" + " for one seed" * (says != "the same")


def test_what_did_not_learn_is_marked():
    found = made.arms(right={"composed": 0.7, "task-only": 0.65, "random": 0.2}, n=40)
    for line in found:
        if line["part"] == "groups":
            line["commonest"] = ["NOUN", 0.3 if line["language"] == "frp" else 0.1]
    claims, rows = cells(table_of(found, "Claims")), cells(table_of(found, "Accuracy"))
    assert list(claims) == [
        "composed > task-only",
        "composed > random (random in frp: no better than the most frequent label)",
    ]
    row = rows["most frequent label"]
    assert (row["what is on the model"], row["frp"], row["an"], row["mean"]) == (
        *("always NOUN", "30.0", "10.0", "20.0"),
    )


def test_the_table_says_which_weight_was_chosen():
    found = made.arms(("frp",), right={"composed": 0.6, "weighted": 0.6}, n=40)
    found = [
        {**line, "settings": {**line["settings"], "weight": 0.5 if arm == "weighted" else 1.0}}
        for line in found
        if (arm := line.get("arm")) or line["part"] == "groups"
    ]
    rows = cells(table_of(found, "Accuracy"))
    assert rows["weighted"]["what is on the model"] == "task SFT + weighted language SFT, times 0.5"
    assert rows["composed"]["what is on the model"] == "task SFT + language SFT"
    claims = cells(table_of(found, "Claims"))
    assert claims["weighted > composed"]["frp"] == "0.0 [0.0, 0.0] the same"


def test_verdicts_follow_the_scores():
    right = {"task-only": 0.599, "composed": 0.6, "wrong-language": 0.7, "random": 0.5}
    claims = cells(table_of(made.arms(right=right), "Claims"))
    assert {name: row["mean"].rpartition("] ")[2] for name, row in claims.items()} == {
        "composed > task-only": "**undecided**",
        "composed > wrong-language": "**does not hold**",
        "composed > random": "**holds**",
    }


def test_an_arm_that_lacks_a_language_or_a_seed_is_compared_where_it_can_be():
    found = [
        line
        for line in made.arms(n=60)
        if (line.get("arm"), line["language"]) != ("random", "an")
        and (line.get("arm"), line["seed"]) != ("denoised", 2)
    ]
    rows, claims = cells(table_of(found, "Accuracy")), cells(table_of(found, "Claims"))
    assert rows["random"]["an"] == rows["random"]["mean"] == rows["random"]["− composed"] == ""
    assert rows["random"]["frp"] != ""
    assert claims["composed > random"]["an"] == claims["composed > random"]["mean"] == ""
    assert claims["composed > random"]["frp"].endswith("holds")
    assert rows["denoised"]["seeds"] == "2"
    same = [line for line in found if line["seed"] != 2]
    assert claims["denoised > composed"] == cells(table_of(same, "Claims"))["denoised > composed"]


def test_one_language_has_no_mean_and_one_seed_is_said_to_be_one():
    found = made.arms(("frp",), seeds=1)
    assert "mean" not in cells(table_of(found, "Accuracy"))["composed"]
    assert "they know nothing of other seeds" in report.conditions(study(found))
    claims = cells(table_of(found, "Claims"))
    assert claims["composed > task-only"]["frp"].endswith("] holds for one seed")


def test_many_languages_are_counted():
    found = made.arms([f"l{i}" for i in range(8)], n=40)
    row = cells(table_of(found, "Claims"))["composed > task-only"]
    assert int(row["holds in"]) + int(row["does not hold in"]) + int(row["undecided in"]) == 8
    by_language = table_of(found, "Accuracy, %, by language")
    assert [row[0] for row in by_language.rows] == [f"l{i}" for i in range(8)]
    assert "8 languages with 40 to 40 examples" in report.conditions(study(found))


def test_views_have_tables_of_their_own():
    titles = [
        table.title for table in report.tables(study(made.arms(n=40, views=("unambiguous",))))
    ]
    assert titles == [
        "Claims: differences in points of accuracy", "Accuracy, %",
        "Claims: differences in points of accuracy, words that are unambiguous",
        "Accuracy, %, words that are unambiguous",
    ]  # fmt: skip


def test_conditions_come_from_the_lines():
    assert report.conditions(study(made.arms(n=50))).startswith(
        "pos, data 0123456789abcdef; a-package 1.0; base model a base; Some CPU, 2 threads, bf16, "
        "torch 2.13.0, python 3.11.7; 2026-01-02. Test data: frp 50 examples ("
    )


def test_ladder_grid_and_overlap():
    rows = table_of(made.ladder(), "Densities").rows
    # The mean of two seeds, 0.6 + 0.02 + 0.01 + 0.005.
    assert ["task SFT of it + language SFT", "1 %", "63.5", "63.5"] in rows
    assert [row[1] for row in rows[:3]] == ["0.25 %", "1 %", "8 %"]
    grid = cells(table_of(made.grid(), "Density × density in frp"))
    assert grid["8 %"] == {
        "task ↓ language →": "8 %",
        "2 %": "67.2",
        "8 %": "67.8",
        "30 %": "**70.0**",
    }
    titles = {table.title for table in report.tables(study([*made.ladder(), *made.grid()]))}
    assert titles == {
        "Densities: accuracy, %, means over 2 seeds, without intervals",
        "Density × density in frp: accuracy, %, one seed, without intervals",
    }
    without = [line for line in made.grid() if line["language_density"] != 0.08]
    one_missing = [*without, *made.grid()[1:2]]
    assert cells(table_of(one_missing, "Density"))["30 %"]["8 %"] == ""
    overlap = cells(table_of(made.overlap(), "Overlap"))
    # frp and an share 200 of 1,000 and 2,000.
    assert (overlap["frp"]["an"], overlap["an"]["frp"], overlap["an"]["an"]) == ("20.0", "10.0", "")
    again = [{**line, "seed": 1, "shared": line["shared"] + 100} for line in made.overlap()]
    assert cells(table_of([*made.overlap(), *again], "Overlap"))["frp"]["an"] == "25.0"


def test_the_newest_line_of_a_setting_counts(tmp_path):
    old = made.arms(("frp",), seeds=1)
    new = [{**line, "date": "2026-01-03T00:00:00Z"} for line in made.arms(("frp",), seeds=1, n=30)]
    for found in ([*old, *new], [*new, *old]):
        kept = lines.read([written(tmp_path / "a.jsonl", found)])
        assert {line["date"][:10] for line in kept} == {"2026-01-03"}
        assert len(kept) == len(old)
    other = {"schema": 9, "kind": "transfer"}, {"schema": 1, "kind": "else"}
    assert lines.read([written(tmp_path / "b.jsonl", other)]) == []
    every = [*made.arms(), *made.ladder(), *made.grid(), *made.overlap()]
    assert len(lines.read([written(tmp_path / "c.jsonl", every)])) == len(every)


def test_lines_that_cannot_be_right_are_named(tmp_path):
    wrong = made.arms(("frp",), seeds=1)
    wrong[2]["score"] += 0.01
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 3: the score is 0\.\d+, and that of its c"
    ):
        lines.read([written(tmp_path / "a.jsonl", wrong)])
    (tmp_path / "b.jsonl").write_text('{"schema": 1, "kind"\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: "):
        lines.read([tmp_path / "b.jsonl"])


def test_lines_of_different_runs_are_not_mixed():
    one, two = made.arms(("frp",)), made.arms(("an",))
    for line in two:
        line["data"] = {"content": "another"}
    with pytest.raises(ValueError, match="differ in data: 0123456789abcdef and another"):
        lines.studies([*one, *two])
    two = made.arms(("an",), settings={**made.SETTINGS, "recipes": {"task": {"lr": 1}}})
    three = made.arms(("sc",), settings={**made.SETTINGS, "recipes": {"task": {"lr": 2}}})
    with pytest.raises(ValueError, match="arms task-only an seed 0 and arms task-only sc seed 0"):
        lines.studies([*one, *two[:-1], *three[:-1]])


def test_lines_of_two_precisions_are_not_mixed():
    found = made.arms(("frp",), settings={**made.SETTINGS, "precision": "fp32"})
    with pytest.raises(ValueError, match="differ in precision: fp32 and bf16"):
        lines.studies([*found[:3], *made.arms(("an",))])


def test_groups_of_other_examples_are_refused():
    found = made.arms(("frp",), 1, n=40)
    found[-1]["groups"] = found[-1]["groups"][:39]
    with pytest.raises(ValueError, match="pos quick: frp has 40 test examples and groups for 39"):
        list(report.tables(study(found)))


def test_experiments_come_in_order():
    found = [*made.arms(("an",), 1, experiment="mine", size="own"), *made.arms(("an",), 1)]
    assert [report.title(x) for x in report.ordered(found)] == [
        "Parts of speech, `--quick`",
        "mine",
    ]


@pytest.fixture
def written_to(tmp_path, monkeypatch):
    """README, page and images in another folder, with nothing between the marks."""
    found = {
        "README": tmp_path / "README.md",
        "PAGE": tmp_path / "transfer.md",
        "IMAGES": tmp_path / "images",
    }
    for name, path in found.items():
        monkeypatch.setattr(report, name, path)
    begin, end = report.MARKS
    for name in ("README", "PAGE"):
        found[name].write_text(f"before\n{begin}\nstale\n{end}\nafter", encoding="utf-8")
    return tmp_path


def test_only_what_is_between_the_marks_changes(written_to):
    report.write(made.arms(seeds=1, n=40))
    for name, start in (("transfer.md", "### Parts of speech"), ("README.md", "| arm |")):
        text = (written_to / name).read_text("utf-8")
        assert text.startswith(f"before\n{report.MARKS[0]}\n\n{start}")
        assert text.endswith(f"{report.MARKS[1]}\nafter")
        assert "stale" not in text
    readme = (written_to / "README.md").read_text("utf-8")
    assert "Accuracy, %; pos, data 0123456789abcdef" in readme
    assert "− composed" not in readme
    # README shows one experiment; without its lines it stays as it is.
    report.write(made.arms(seeds=1, n=40, experiment="topics"))
    assert (written_to / "README.md").read_text("utf-8") == readme
    (written_to / "transfer.md").write_text("no marks")
    with pytest.raises(ValueError, match=r"transfer\.md has no <!-- transfer:begin"):
        report.write([])


def test_faults_are_what_differs(written_to):
    page, images = written_to / "transfer.md", written_to / "images"
    found = [*made.arms(seeds=1, n=40), *made.ladder(), *made.grid(), *made.overlap()]
    first, *others = report.faults(found)
    assert first == f"{page} is not what the stored lines give"
    assert len(others) == 5  # README and every plot
    report.write(found)
    assert report.faults(found) == []
    drawn = {path.name for path in images.iterdir()}
    assert drawn == {f"transfer-pos-quick{x}.svg" for x in ("", "-ladder", "-grid", "-overlap")}
    for name in drawn:
        assert f"(images/{name})" in page.read_text("utf-8")
    bytes_before = {path: path.read_bytes() for path in images.iterdir()}
    report.write(found)
    assert {path: path.read_bytes() for path in images.iterdir()} == bytes_before
    # Another score: of the page, and of one plot.
    changed = [dict(line) for line in found]
    at = next(i for i, line in enumerate(changed) if line["part"] == "grid")
    changed[at]["score"] = 0.1
    assert len(report.faults(changed)) == 2
    fewer = [line for line in found if line["part"] != "ladder"]
    assert [fault for fault in report.faults(fewer) if "no line" in fault] == [
        f"{images / 'transfer-pos-quick-ladder.svg'} is drawn from no line"
    ]
    report.write(fewer)
    assert report.faults(fewer) == []
    assert not (images / "transfer-pos-quick-ladder.svg").exists()


def test_report_of_own_data_has_the_papers_figures(tmp_path):
    found = made.arms(("hsb", "xx"), 1, n=40, experiment="dp", size="own", metric="las")
    path = report.write_to(found, tmp_path / "out")
    text = path.read_text("utf-8")
    assert text.startswith("# Transfer\n\n### dp\n")
    assert (tmp_path / "out" / "transfer-dp-own.svg").exists()
    assert "(./transfer-dp-own.svg)" in text
    row = cells(table_of(found, "The papers: LAS"))["LT-SFT (composed)"]
    assert row["hsb"] == report.points(papers.beside("dp", "hsb", "composed", "las")) != ""
    assert row["xx"] == ""
    others = made.arms(("hsb",), 1, n=40, experiment="else", size="own")
    assert len(list(report.tables(study(others)))) == 2


def test_tables_of_a_terminal_have_every_figure():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = [*made.arms(seeds=1), *made.grid()]
    report.show(found, console)
    text = console.export_text()
    for table in report.tables(study(found)):
        for row in table.rows:
            figures = [x.strip("*") for x in row[1:] if x.strip("*").replace(".", "").isdigit()]
            assert all(figure in text for figure in figures)
    assert "**" not in text


def test_missing_cells_of_a_grid_are_nan():
    columns, rows, found = report.grid(made.grid()[1:])
    assert (columns, rows) == ([0.02, 0.08, 0.3], [0.02, 0.08, 0.3])
    assert math.isnan(found[0, 0])
    assert np.isfinite(found).sum() == 8
