"""The density sweep: one full phase, nested supports, a ticket's bits, a folder that resumes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_docs import ROOT, blocks
from torch import nn

import sparse_ft as sf
from sparse_ft.sweep import Sweep, TrainSpec, density_sweep, evaluate_grid, fit_densities

DENSITIES = (0.1, 0.4, 1.0)


class Tiny(nn.Module):
    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Training:
    """A deterministic training function that notes the phases it was called for."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(64, 12, generator=draw)
        self.y = torch.randint(3, (64,), generator=draw)
        self.phases: list[str] = []

    def __call__(self, phase) -> None:
        self.phases.append(phase.name)
        optimizer = phase.optimizer(lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(phase.model(self.x), self.y).backward()
            optimizer.step()


def spec(seed: int = 0) -> TrainSpec:
    torch.manual_seed(0)
    return TrainSpec(Tiny(), Training(seed), {"l1": 0.1}, {"role": "task"})


def positions(delta: sf.SparseDelta) -> set[tuple[str, int]]:
    support = delta.support
    return {(n, i) for n in support.layout.names for i in support.indices(n).tolist()}


def test_one_full_phase_serves_all_densities(tmp_path: Path) -> None:
    one = spec()
    before = sf.snapshot(one.model)
    deltas = fit_densities(one, DENSITIES, tmp_path)
    assert one.train.phases == ["full", "sparse", "sparse", "sparse"]
    assert list(deltas) == list(DENSITIES)
    n = 12 * 12 + 12
    assert [d.nnz for d in deltas.values()] == [int(0.1 * n), int(0.4 * n), n]
    sets = [positions(d) for d in deltas.values()]
    assert sets[0] < sets[1] < sets[2]
    assert all(torch.equal(before[name], p) for name, p in one.model.named_parameters())


@pytest.mark.parametrize("density", DENSITIES)
def test_each_is_what_a_ticket_gives(tmp_path: Path, density: float) -> None:
    found = fit_densities(spec(), DENSITIES, tmp_path)[density]
    alone = spec()
    ticket = sf.LotteryTicket(alone.model, density=density, l1=0.1)
    expected = ticket.fit(alone.train, **alone.meta)
    assert positions(found) == positions(expected)
    assert found.content_id == expected.content_id


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    fit_densities(spec(), [0.1, 0.4], tmp_path)
    again = spec()
    deltas = fit_densities(again, DENSITIES, tmp_path)
    assert again.train.phases == ["sparse"]  # of the density that is new
    whole = fit_densities(spec(), DENSITIES, tmp_path / "whole")
    assert [d.content_id for d in deltas.values()] == [d.content_id for d in whole.values()]


def test_a_kill_between_phases_keeps_the_full_phase(tmp_path: Path) -> None:
    class Killed(Training):
        def __call__(self, phase) -> None:
            if phase.name == "sparse":
                raise KeyboardInterrupt
            super().__call__(phase)

    one = spec()
    with pytest.raises(KeyboardInterrupt):
        fit_densities(TrainSpec(one.model, Killed(0), one.ticket, one.meta), DENSITIES, tmp_path)
    again = spec()
    deltas = fit_densities(again, DENSITIES, tmp_path)
    assert again.train.phases == ["sparse"] * 3
    whole = fit_densities(spec(), DENSITIES, tmp_path / "whole")
    assert [d.content_id for d in deltas.values()] == [d.content_id for d in whole.values()]


def test_a_full_model_of_others_is_refused(tmp_path: Path) -> None:
    fit_densities(spec(), [0.1], tmp_path)
    before = (tmp_path / "full.safetensors").read_bytes()
    torch.manual_seed(1)
    for other in (
        TrainSpec(Tiny(), Training(0), {"l1": 0.1}, {"role": "task"}),
        TrainSpec(spec().model, Training(0), {"l1": 0.2}, {"role": "task"}),
    ):
        with pytest.raises(ValueError, match=r"full.safetensors' was tuned with other settings"):
            fit_densities(other, [0.4], tmp_path)
    assert (tmp_path / "full.safetensors").read_bytes() == before
    assert not (tmp_path / "0.4").exists()
    with pytest.raises(ValueError, match="iterations have a full phase each"):
        fit_densities(TrainSpec(Tiny(), Training(0), {"iterations": 2}), [0.4], tmp_path / "n")


def test_densities_that_print_alike_are_two(tmp_path: Path) -> None:
    deltas = fit_densities(spec(), [0.4, 0.40000001], tmp_path)
    assert len(deltas) == 2
    assert {"0.4", "0.40000001"} <= {p.name for p in tmp_path.iterdir()}


def test_cells_of_another_measure_are_others(tmp_path: Path) -> None:
    deltas = fit_densities(spec(), [0.1], tmp_path)
    files = {0.1: tmp_path / "x.safetensors"}
    deltas[0.1].save(files[0.1])
    path = tmp_path / "cells.jsonl"
    for measure, score in (("a", 1.0), ("b", 2.0)):
        for sfts in (deltas, files):
            found = evaluate_grid(sfts, deltas, lambda *pair, s=score: s, path, measure)
            assert found.scores.tolist() == [[score]]
    assert len(path.read_text().splitlines()) == 2


def test_entries_that_never_moved_fill_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(8, 3))
    ids, y = torch.randint(10, (16, 2)), torch.randint(3, (16,))

    def train(phase) -> None:
        optimizer = phase.optimizer(lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(phase.model(ids), y).backward()
            optimizer.step()

    (delta,) = fit_densities(TrainSpec(model, train), [1.0], tmp_path).values()
    assert delta.nnz == sum(p.numel() for p in model.parameters())
    assert not delta.dense("0.weight")[10:].any()
    assert delta.dense("0.weight")[:10].any()


class Evaluation:
    """Scores cells by what lies in the files, and notes which it was asked for."""

    def __init__(self, fail: int | None = None) -> None:
        self.cells: list[tuple[int, int]] = []
        self.fail = fail

    def __call__(self, language: sf.SparseDelta, task: sf.SparseDelta) -> float:
        if len(self.cells) == self.fail:
            raise KeyboardInterrupt
        self.cells.append((language.nnz, task.nnz))
        return task.nnz + language.nnz / 1000


def sweep(folder: Path, evaluate: Evaluation, densities=DENSITIES, **options) -> Sweep:
    return density_sweep(spec(1), spec(2), evaluate, folder, densities, **options)


def test_every_pair_is_evaluated_once(tmp_path: Path) -> None:
    evaluate = Evaluation()
    found = sweep(tmp_path, evaluate, task_densities=[0.4, 0.1])
    n = 12 * 12 + 12
    language, task = [int(d * n) for d in DENSITIES], [int(0.1 * n), int(0.4 * n)]
    assert (found.language, found.task) == (DENSITIES, (0.1, 0.4))
    assert evaluate.cells == [(a, b) for b in task for a in language]
    assert np.array_equal(found.scores, [[b + a / 1000 for a in language] for b in task])
    assert found.best == (1.0, 0.4, found.scores[1, 2])


def test_cells_come_back_from_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, Evaluation(fail=4))
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"language": 0.1, "ta')  # the line that a kill cut off
    rest = Evaluation()
    found = sweep(tmp_path, rest)
    assert len(rest.cells) == 9 - 4
    none = Evaluation()
    assert np.array_equal(sweep(tmp_path, none).scores, found.scores)
    assert none.cells == []
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [{k: c[k] for k in ("language", "task", "score")} for c in cells] == found.rows()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    sweep(tmp_path, Evaluation(), [0.1, 0.4])
    path = tmp_path / "cells.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(ValueError, match=r"line 1 of .*cells\.jsonl"):
        sweep(tmp_path, Evaluation(), [0.1, 0.4])


@pytest.mark.parametrize(
    ("densities", "message"),
    [([], "empty"), ([0.0, 0.5], r"\(0, 1\]"), ([0.5, 1.5], r"\(0, 1\]"), ([0.5, 0.5], "twice")],
)
def test_densities_out_of_range_are_refused(tmp_path: Path, densities, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "out", Evaluation(), densities)
    assert not (tmp_path / "out").exists()


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nan.*0\.1 \(language\) and 0\.1 \(task\)"):
        density_sweep(spec(1), spec(2), lambda a, b: float("nan"), tmp_path, [0.1])
    assert not (tmp_path / "cells.jsonl").exists()


GRID = Sweep((0.05, 0.3, 1.0), (0.1, 1.0), np.array([[0.1, 0.4, 0.2], [0.3, 0.9, 0.25]]))


def test_the_grid_is_written_and_drawn(tmp_path: Path) -> None:
    console = pytest.importorskip("rich.console").Console(width=80, record=True)
    console.print(GRID.table())
    shown = console.export_text()
    assert all(text in shown for text in ("0.05", "0.3", "0.9", "0.25"))
    GRID.to_csv(tmp_path / "grid.csv")
    with (tmp_path / "grid.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == GRID.rows()
    assert rows[1] == {"language": 0.3, "task": 0.1, "score": 0.4}
    pytest.importorskip("matplotlib")
    GRID.plot(tmp_path / "grid.png", "F1")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf"):
        GRID.plot(tmp_path / "grid.bmp")
    with pytest.raises(ValueError, match="two densities"):
        Sweep((0.1,), (0.1, 1.0), np.ones((2, 1))).plot(tmp_path / "line.png")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    language, task = spec(1), spec(2)
    names: dict[str, object] = {
        "language_model": language.model, "language_loop": language.train,
        "task_model": task.model, "task_loop": task.train,
        "f1": lambda model: float((model(task.train.x).argmax(1) == task.train.y).double().mean()),
    }  # fmt: skip
    others = fit_densities(spec(3), (0.1, 0.2, 0.3), tmp_path / "others").values()
    names |= dict(zip(("swahili", "hausa", "yoruba"), others, strict=True))
    for block in blocks(ROOT / "docs" / "analyses.md"):
        exec(compile(block, "docs/analyses.md", "exec"), names)
    assert {"density.png", "density.csv", "overlap.png"} <= {p.name for p in tmp_path.iterdir()}
