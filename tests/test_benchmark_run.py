"""The benchmark proves every result, finds every peer, and judges by the right arithmetic."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import case, cases, inputs, run, shapes  # noqa: F401
from benchmarks.case import RECIPES, Case, Provider, Setting, Target
from benchmarks.clocks import CpuClock

ROOT = Path(__file__).parents[1]


# In a process of its own, since a test here has another torch.empty, which knows no meta device.
PARAMETERS = """
import json, torch, transformers
encoder = {"max_position_embeddings": 514, "type_vocab_size": 1}
def sizes(hidden, layers, feed_forward):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": feed_forward,
        "num_attention_heads": hidden // 64,
    }
known = {
    "xlmr-base": ("XLMRoberta", "Model", 250002, sizes(768, 12, 3072) | encoder),
    "xlmr-large": ("XLMRoberta", "Model", 250002, sizes(1024, 24, 4096) | encoder),
    "xlmr-xl": ("XLMRobertaXL", "Model", 250880, sizes(2560, 36, 10240) | encoder),
    "xlmr-xxl": ("XLMRobertaXL", "Model", 250880, sizes(4096, 48, 16384) | encoder),
    "llama-8b": ("Llama", "ForCausalLM", 128256,
        {**sizes(4096, 32, 14336), "num_attention_heads": 32, "num_key_value_heads": 8,
         "tie_word_embeddings": False}),
}
found = {}
for name, (family, kind, pieces, options) in known.items():
    config = getattr(transformers, family + "Config")(vocab_size=pieces, **options)
    with torch.device("meta"):
        model = getattr(transformers, family + kind)(config)
    found[name] = {name: list(p.shape) for name, p in model.named_parameters()}
print(json.dumps(found))
"""


def test_models_have_the_parameters_of_transformers():
    done = subprocess.run(
        [sys.executable, "-c", PARAMETERS], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(done.stdout)
    assert len(found) == 5
    for name, wanted in found.items():
        assert {n: list(shape) for n, shape in shapes.MODELS[name].items()} == wanted, name


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("xlmr-base", 0.28),
        ("xlmr-large", 0.56),
        ("xlmr-xl", 3.48),
        ("xlmr-xxl", 10.7),
        ("llama-8b", 8.03),
    ],
)
def test_sizes_are_those_published(name, billions):
    assert shapes.numel(name) / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_plain_size_is_exact():
    assert shapes.numel("N=1234567") == 1_234_567


def test_inputs_are_the_same_for_the_same_seed_and_not_zero():
    setting = Setting("5M")
    first, again, other = (inputs.tensors(setting, seed) for seed in (0, 0, 1))
    assert inputs.equal(first, again)
    assert not inputs.equal(first, other)
    assert all(float((t == 0).float().mean()) < 1e-3 for t in first)
    # Two seeds repeat with different periods, so their difference has hardly a value twice.
    difference = torch.cat([(a - b).view(-1) for a, b in zip(first, other, strict=True)])
    assert len(difference.unique()) > 0.5 * len(difference)


def test_clustered_supports_are_uneven_and_uniform_ones_are_not():
    def shares(kind):
        setting = Setting("5M", density=0.1, support=kind)
        model = inputs.tensors(setting, 0)
        idx, ptr = inputs.support(setting, model, 0)
        assert len(idx) == setting.nnz
        at = inputs.positions(model, idx, ptr)
        rows = torch.zeros(model[1].numel())  # the embeddings; before them comes the bias
        rows[at[1]] = 1
        by_row = rows.view(model[1].shape).mean(1)
        by_tensor = torch.tensor([len(a) / t.numel() for a, t in zip(at, model, strict=True)][1:])
        return by_row.std() / by_row.mean(), by_tensor.std() / by_tensor.mean()

    rows, tensors = shares("uniform")
    # Binomial rows of 128 at 10 %: a relative deviation of sqrt(0.9 / 12.8) = 0.27.
    assert 0.2 < rows < 0.35
    assert tensors < 0.02
    rows, tensors = shares("clustered")
    assert rows > 0.8
    assert tensors > 0.2


def test_surplus_is_the_difference_of_touched_lines():
    setting = Setting("N=1048576", density=0.25, support="clustered")
    # A quarter of the lines in full: a uniform support would touch 1 - 0.75^16 = 99 % of them.
    at = [torch.arange(262_144)]
    uniform = 1_048_576 * 4 * (1 - 0.75**16)
    assert inputs.surplus(setting, at) == pytest.approx(262_144 * 4 - uniform, abs=1)


class Ticks(CpuClock):
    """A clock by which a job takes as many seconds as it returns."""

    def __init__(self):
        self.yardsticks = {
            "copy": run.clocks.Yardstick(lambda: 2.0, 8_000_000_000),
            "read": run.clocks.Yardstick(lambda: 1.0, 8_000_000_000),
        }

    def seconds(self, job):
        return job(), 0.0

    def begin_peak(self):
        pass

    def peak_extra_bytes(self):
        return 1000

    def free_bytes(self):
        return 10**9


def made_up(providers, targets=(), numel="N=100000000"):
    return Case(
        "made_up", Setting(numel), 4e9, providers, verify=lambda: None, targets=tuple(targets)
    )


HERE = {"machine": {"threads": 2}, "commit": "abc", "date": "2026-01-01"}


def test_a_line_holds_medians_floor_and_targets():
    times = iter([9.0, 2.0, 1.0, 3.0])  # the first run is not timed
    made = made_up(
        {
            "sparse_ft": Provider(lambda: lambda: next(times)),
            "peer": Provider(lambda: lambda: 6.0, "a book"),
            "too large": Provider(lambda: lambda: 1.0, extra_bytes=2e9),
        },
        [
            Target("floor", 0.6),
            Target("floor", 0.4),
            Target("peer", 2.9, "peer"),
            Target("peer", 3.1, "peer"),
            Target("memory", 1.0, "peer"),
            Target("peer", 1, "too large"),
        ],
    )
    record = run.line(made, run.measure(made, 3, Ticks()), HERE)
    assert json.loads(json.dumps(record)) == record
    ours = record["providers"]["sparse_ft"]
    assert (ours["median"], ours["p20"], ours["p80"], ours["rounds"]) == (2.0, 1.0, 3.0, 3)
    assert record["bandwidth"] == {"copy": 4e9, "read": 8e9}
    assert record["floor"] == 1.0  # 4 GB at 4 GB/s
    assert record["providers"]["peer"]["source"] == "a book"
    assert "needs about 2.0 GB" in record["providers"]["too large"]["skipped"]
    found = [(t["kind"], t["found"], t["passed"]) for t in record["targets"]]
    assert found == [
        ("floor", 0.5, False),
        ("floor", 0.5, True),
        ("peer", 3.0, True),
        ("peer", 3.0, False),
        ("memory", 1.0, True),
    ]


def test_a_slow_provider_sits_out_rounds():
    made = made_up(
        {
            "sparse_ft": Provider(lambda: lambda: 0.1),
            "slow": Provider(lambda: lambda: 4.0),
        }
    )
    measured = run.measure(made, 10, Ticks())["providers"]
    assert measured["sparse_ft"]["rounds"] == 10
    assert measured["slow"]["rounds"] == run.LEAST_ROUNDS


def test_targets_hold_for_large_models_only():
    made = made_up({"sparse_ft": Provider(lambda: lambda: 1.0)}, [Target("floor", 0.5)], "5M")
    assert run.line(made, run.measure(made, 3, Ticks()), HERE)["targets"] == []


def test_a_wrong_result_stops_the_case():
    def wrong(_):
        raise AssertionError("not this")

    made = made_up(
        {
            "sparse_ft": Provider(lambda: lambda: 1.0),
            "peer": Provider(lambda: lambda: 1.0, check=wrong),
        }
    )
    with pytest.raises(AssertionError, match="peer gave a wrong result: not this"):
        run.measure(made, 3, Ticks())


def test_a_peer_may_fail_and_we_may_not():
    def fails():
        raise RuntimeError("no such thing")

    made = made_up(
        {
            "sparse_ft": Provider(lambda: lambda: 1.0),
            "peer": Provider(lambda: fails),
        }
    )
    assert "no such thing" in run.measure(made, 3, Ticks())["providers"]["peer"]["error"]
    made.providers = dict(reversed(made.providers.items()))
    with pytest.raises(RuntimeError, match="no such thing"):
        run.measure(made, 3, Ticks())


def stored(ours, **peers):
    providers = {"sparse_ft": {"median": ours}}
    providers |= {name: {"median": seconds} for name, seconds in peers.items()}
    setting = {
        "study": "cases",
        "op": "compose",
        "shape": "5M",
        "density": 0.1,
        "dtype": "fp32",
        "device": "cpu",
        "support": "uniform",
    }
    return {"schema": run.SCHEMA, **setting, "providers": providers, "commit": "abc"}


def test_comparison_is_by_ratios_to_the_peers():
    # A machine twice as slow at everything has lost nothing.
    assert run.compared(stored(2.0, a=8.0, b=20.0), stored(1.0, a=4.0, b=10.0)) == 1.0
    # We twice as slow, the peers as before: half of the advantage.
    assert run.compared(stored(2.0, a=4.0), stored(1.0, a=4.0)) == 0.5
    # One peer four times as slow, one as before: the geometric mean is two.
    assert run.compared(stored(1.0, a=16.0, b=1.0), stored(1.0, a=4.0, b=1.0)) == pytest.approx(2)
    assert math.isnan(run.compared(stored(1.0, a=1.0), stored(1.0, b=1.0)))


def test_comparison_is_with_peers_that_do_the_whole_job():
    # Our own variants and parts of the job say nothing of our advantage.
    then, now = stored(1.0, a=4.0, part=1.0), stored(1.0, a=4.0, part=0.1)
    for record in (then, now):
        record["providers"]["part"]["whole"] = False
        record["providers"]["sparse_ft, another way"] = {"median": 5.0}
    now["providers"]["sparse_ft, another way"]["median"] = 50.0
    assert run.compared(now, then) == 1.0


@pytest.mark.parametrize(("seconds", "turns"), [(0.1, set(range(7))), (9.0, {0, 3, 6})])
def test_rounds_of_slow_providers_are_spread(seconds, turns):
    assert run._turns(seconds, 7) == turns


@pytest.mark.parametrize(
    "words",
    [
        ["--density", "5"],
        ["--repeats", "0"],
        ["--compare", "no/such/file"],
        ["--json", "no/such/folder/lines.jsonl"],
    ],
)
def test_bad_options_end_before_anything_is_measured(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", *words])
    monkeypatch.setattr(run, "run_case", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == 2
    assert words[1] in capsys.readouterr().err


def test_a_model_that_a_case_has_not_is_skipped(capsys):
    assert run.run_case("training_step", Setting("25M"), 3, Ticks(), HERE) is None
    assert "skipped: it is for 5M" in capsys.readouterr().out


def test_compare_finds_what_got_worse(tmp_path, capsys):
    path = tmp_path / "then.jsonl"
    # The last line of a case counts.
    path.write_text("\n".join(json.dumps(stored(x, a=4.0)) for x in (9.0, 1.0)) + "\n")
    assert run.compare([stored(1.1, a=4.0)], run.read_lines(path), 0.25) == []
    assert "same" in capsys.readouterr().out
    (worse,) = run.compare([stored(2.0, a=4.0)], run.read_lines(path), 0.25)
    assert "0.50 of the advantage at abc" in worse
    unknown = {**stored(2.0, a=4.0), "dtype": "bf16"}
    assert "no case of this run" in run.compare([unknown], run.read_lines(path), 0.25)[0]
    assert "no stored line" in capsys.readouterr().out


def test_what_does_not_fit_is_skipped_with_a_line(capsys):
    assert run.run_case("masked_adamw", Setting("llama-8b"), 3, Ticks(), HERE) is None
    text = capsys.readouterr().out
    assert "skipped: it needs about" in text
    assert "1.0 are free" in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_options_change_the_plan(device):
    parser = run._parser()
    plan = run.plan_of(parser.parse_args(["--device", device]))
    assert len(set(plan)) == len(plan)
    assert all(setting.device == device for _, setting in plan)
    words = ["--device", device, "--op", "compose", "--dtype", "bf16", "--shape", "25M"]
    plan = run.plan_of(parser.parse_args([*words, "--density", "0.1", "--support", "clustered"]))
    assert plan == [("compose", Setting("25M", 0.1, "bf16", device, "clustered"))]
    plan = run.plan_of(parser.parse_args(["--device", device, "--quick"]))
    expected = {op for op, recipe in RECIPES.items() if device == "cpu" or not recipe.cpu_only}
    assert {op for op, _ in plan} == expected
    # The density makes no difference to a dense op, so it is no second line.
    plan = run.plan_of(parser.parse_args(["--op", "dense_adamw", "--density", "0.1"]))
    assert {setting.density for _, setting in plan} == {1.0}


@pytest.mark.parametrize("bad", [{"density": 0.0}, {"density": 2.0}, {"dtype": "fp8"}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Setting("5M", **bad)


def test_quick_run_proves_every_case_and_finds_every_peer(tmp_path):
    """One process: every case and dtype, each peer with a time, each with a source."""
    path = tmp_path / "quick.jsonl"
    words = [sys.executable, "-m", "benchmarks.run", "--quick", "--json", str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    records = run.read_lines(path)
    assert {(r["op"], r["dtype"]) for r in records} == {
        (op, dtype) for op in RECIPES for dtype in case.DTYPES
    }
    for record in records:
        ours, *peers = record["providers"].items()
        assert ours[0].startswith("sparse_ft")
        assert peers, record["op"]
        for name, measured in [ours, *peers]:
            assert measured["median"] > 0, (record["op"], name)
            assert name.startswith("sparse_ft") or measured["source"], (record["op"], name)
        assert record["floor"] is None or record["floor"] > 0
