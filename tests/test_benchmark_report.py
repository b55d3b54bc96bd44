"""Tables, plots and exponents say what the lines say, and README what the stored ones do."""

import json
import math

import pytest

from benchmarks import lines, plots, report, scaling
from benchmarks.case import RECIPES, Setting

MACHINE = {"cpu": "Some CPU", "threads": 2, "library": "lib.so, avx2", "python": "3.11.7",
           "torch": "2.13.0", "os": "Linux"}  # fmt: skip


def made_up(op="compose", seconds=None, *, density=0.028, shape="xlmr-base", **more):
    """A line in which the floor is 10 ms, of 1 GB by a copy at 100 GB/s."""
    providers = {
        name: {"median": s, "p20": 0.9 * s, "p80": 1.1 * s, "rounds": 5, "peak_extra_bytes": 4e6}
        for name, s in (seconds or {"sparse_ft": 0.02, "w += COO": 0.2, "index_add_": 0.05}).items()
    }
    line = {
        "schema": 2, "study": "cases", "op": op, "shape": shape, "density": density,
        "dtype": "fp32", "device": "cpu", "support": "uniform", "numel": 278_043_648,
        "nnz": 7_785_222, "bytes_moved": 1_000_000_000, "note": "", "yardstick": "copy",
        "bandwidth": {"copy": 100e9, "read": 90e9}, "floor": 0.01, "providers": providers,
        "targets": [], "machine": MACHINE, "commit": "abc1234", "date": "2026-01-02",
    }  # fmt: skip
    return {**line, **more}


def power_law(exponent, numels=(10**6, 10**7, 10**8), **more):
    """Lines of the study of N whose times are 1 ns times N to the exponent."""
    return [
        made_up(
            "digest",
            {"sparse_ft": 1e-9 * n**exponent, "slow": 3e-9 * n},
            study="scaling", shape=f"N={n}", numel=n, nnz=int(0.028 * n), bytes_moved=4 * n, **more,
        )
        for n in numels
    ]  # fmt: skip


def test_stored_lines_are_what_readme_and_page_and_plots_show():
    stored = lines.stored()
    if not stored:
        pytest.skip("no line of this schema is stored")
    assert report.faults(stored) == []


def test_readme_has_the_marks():
    text = report.README.read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    with pytest.raises(ValueError, match="speed:begin"):
        report.readme("no marks", [])


def test_only_what_is_between_the_marks_changes():
    text = f"before\n{report.BEGIN}\nstale\n{report.END}\nafter"
    once = report.readme(text, [made_up()])
    assert once.startswith(f"before\n{report.BEGIN}\n")
    assert once.endswith(f"{report.END}\nafter")
    assert "stale" not in once
    assert report.readme(once, [made_up()]) == once


def test_the_newest_line_of_a_setting_counts():
    first, later = made_up(commit="first"), made_up(commit="later")
    assert [x["commit"] for x in lines.newest([first, later])] == ["later"]
    old = made_up(commit="old", date="2025-12-31")
    assert [x["commit"] for x in lines.newest([first, old])] == ["first"]
    assert len(lines.newest([first, made_up(dtype="bf16"), made_up(study="scaling")])) == 3
    assert lines.newest([made_up(schema=1), {"case": "compose"}]) == []


def test_row_of_readme():
    row = report.speed_table([made_up()]).splitlines()[2]
    assert row == (
        "| Put a fine-tuning on XLM-R base, 2.8 %, with undo | 20 | 50 % | "
        "index_add_: 50 ms, **2.5×** | w += COO: 200 ms, **10×** |"
    )


def test_rows_without_some_peers():
    assert report.speed_table([made_up(seconds={"sparse_ft": 0.02})]).endswith("| 50 % |  |  |")
    only = made_up(seconds={"sparse_ft": 0.02, "w += COO": 0.03})
    assert report.speed_table([only]).endswith("| w += COO: 30 ms, **1.5×** | the same |")
    # Neither another way of ours nor a part of the job is an alternative to it.
    step = {"sparse_ft": 1.0, "sparse_ft, optimizer alone": 0.01, "forward and backward alone": 0.9,
            "gradient × mask, default AdamW": 2.0}  # fmt: skip
    whole = made_up("training_step", step)
    for name in list(step)[1:3]:
        whole["providers"][name]["whole"] = False
    assert lines.fastest_peer(whole) == "gradient × mask, default AdamW"


def test_slower_than_a_peer_is_shown_as_such():
    row = report.speed_table([made_up(seconds={"sparse_ft": 0.02, "index_add_": 0.01})])
    assert "index_add_: 10.0 ms, **0.50×**" in row


def test_conditions_come_from_the_lines():
    text = report.conditions([made_up(), made_up(commit="def", date="2026-01-04")])
    assert text == (
        "Medians of 5 rounds in which all took turns, caches cold; Some CPU, 2 threads "
        "(lib.so, avx2), torch 2.13.0, Python 3.11.7; commit abc1234, def, "
        "2026-01-02 to 2026-01-04."
    )


def test_page_shows_every_provider_and_why_some_did_not_run():
    line = made_up(note="two at once")
    line["providers"]["too large"] = {"source": "a book", "skipped": "needs about 9.0 GB more"}
    line["providers"]["broken"] = {"source": "a paper", "error": "RuntimeError: no"}
    line["targets"] = [
        {"target": "at least 35% of the floor", "kind": "floor", "found": 0.5, "passed": True},
        {"target": "3× faster than index_add_", "kind": "peer", "found": 2.5, "passed": False},
    ]
    text = report.page([line])
    assert "| sparse_ft | 20 | 18.0–22 | 50.0 | 50 % | 4.0 |  |  |" in text
    assert "| index_add_ | 50 | 45–55 | 20.0 | 20 % | 4.0 |  | 2.5× |" in text
    assert text.index("| index_add_ |") < text.index("| w += COO |")
    assert "| too large (left out: needs about 9.0 GB more) |" in text
    assert "| broken (failed: RuntimeError: no) |" in text
    assert "Note: two at once." in text
    assert "at least 35 % of the floor (reached: 50 %)" in text
    assert "3× faster than index_add_ (**missed**: 2.5×)" in text
    assert "| `compose` | too large | a book |" in text
    assert "Nothing was measured on a GPU" in text


def test_gpu_lines_have_a_table_of_their_own():
    gpu = made_up(device="cuda", machine={**MACHINE, "device": "A GPU", "cuda": "13.0",
                                          "triton": "3.6"})  # fmt: skip
    gpu["providers"]["sparse_ft"]["graph"] = {"median": 0.0125}
    text = report.speed([made_up(), gpu])
    on_cpu, on_gpu = text.split("On a GPU:")
    assert "| 50 % |" in on_cpu
    assert "| 80 % |" in on_gpu  # of the replayed graph
    assert "A GPU, torch 2.13.0, cuda 13.0, triton 3.6" in on_gpu
    assert "no figure is claimed" not in text
    assert "no figure is claimed" in report.speed([made_up()])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_slope_of_a_power_law_is_its_exponent(exponent):
    points = [(x, 3 * x**exponent) for x in (1.0, 4.0, 9.0, 100.0)]
    assert lines.slope(points) == pytest.approx(exponent)
    assert math.isnan(lines.slope(points[:1]))


def test_series_are_fitted_where_no_cache_holds_the_model():
    study = power_law(1.0)
    study[0]["providers"]["sparse_ft"]["median"] = 1.0  # of 1M parameters: not fitted
    (series,) = lines.all_series(study)
    assert (series.op, series.over) == ("digest", "numel")
    assert series.names == ["sparse_ft", "slow"]
    assert series.slope("sparse_ft") == pytest.approx(1)
    assert series.slope_of_bytes == pytest.approx(1)


def test_series_over_densities_are_of_one_size():
    study = power_law(1.0) + [
        {**power_law(0.5, (10**7,))[0], "density": d, "nnz": int(d * 10**7)} for d in (0.001, 0.01)
    ]
    over = {series.over: series for series in lines.all_series(study)}
    assert [x["nnz"] for x in over["nnz"].lines] == [10_000, 100_000, 280_000]
    assert [x["numel"] for x in over["numel"].lines] == [10**6, 10**7, 10**8]
    text = report.page(study)
    assert "| `digest` | CPU | parameters | 1M to 100M | 1.00 | 1.00 | slow 1.00 |" in text


def test_slopes_are_printed(capsys):
    scaling.print_slopes(power_law(1.0))
    out = capsys.readouterr().out
    assert "digest over numel" in out
    assert "slow 1.00" in out


def test_study_measures_known_cases_once():
    for device in ("cpu", "cuda"):
        points = scaling.plan(device)
        assert len(set(points)) == len(points)
        assert {op for op, _ in points} == set(scaling.OPS) <= set(RECIPES)


def test_peers_that_would_take_too_long_are_left_out():
    before = made_up(seconds={"sparse_ft": 9.0, "fast": 0.2, "slow": 0.5}, numel=10**7)
    names = ["fast", "slow", "never ran"]
    setting = Setting("N=31622777")
    assert scaling.peers_in_time(setting, before, names) == ["fast"]
    assert scaling.peers_in_time(setting, None, names) == names


def test_plots_are_the_same_bytes_and_name_their_lines(tmp_path):
    study = [made_up(), *power_law(1.0)]
    found = plots.plots(study)
    assert set(found) == {
        "speedup-cpu.svg", "bandwidth-cpu.svg", "scaling-parameters-cpu.svg",
        "scaling-memory-cpu.svg",
    }  # fmt: skip
    for name, plot in found.items():
        plot.save(tmp_path / name)
        first = (tmp_path / name).read_bytes()
        plot.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == first
        assert plot.digest.encode() in first
    # A line read from a file has the same digest; another time gives another.
    again = plots.plots([json.loads(json.dumps(x)) for x in study])
    assert {n: p.digest for n, p in again.items()} == {n: p.digest for n, p in found.items()}
    slower = plots.plots([made_up(seconds={"sparse_ft": 0.021, "w += COO": 0.2})])
    assert slower["speedup-cpu.svg"].digest != found["speedup-cpu.svg"].digest


def test_check_finds_what_differs(tmp_path, monkeypatch, capsys):
    text = f"{report.BEGIN}\n{report.END}\n"
    for name, value in {
        "ROOT": tmp_path, "README": tmp_path / "README.md", "IMAGES": tmp_path / "docs" / "images",
        "PAGE": tmp_path / "docs" / "benchmarks.md",
    }.items():  # fmt: skip
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "stored", lambda: [made_up()])
    (tmp_path / "README.md").write_text(text)
    assert report.main(["--check"]) == 1
    assert "README.md is not what" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == text
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    other = tmp_path / "docs" / "images" / "diagram.svg"
    other.write_text("<svg/>")
    monkeypatch.setattr(report, "stored", lambda: [made_up(commit="def")])
    assert len(report.faults(report.stored())) == 4  # README, the page, and both plots
    monkeypatch.setattr(report, "stored", lambda: power_law(1.0))
    assert report.main([]) == 0
    assert other.exists()
    assert not (tmp_path / "docs" / "images" / "speedup-cpu.svg").exists()
