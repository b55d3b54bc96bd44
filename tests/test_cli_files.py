"""The commands that work on SFT files, from two checkpoints on disk to a merged one."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparse_ft as sf

typer_testing = pytest.importorskip("typer.testing")

from sparse_ft import cli  # noqa: E402  (needs typer)


def run(*arguments, code=0):
    result = typer_testing.CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def document(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def world(tmp_path):
    """A base model, two tuned ones, and their differences as files."""
    generator = torch.Generator().manual_seed(0)

    def model(base=None, share=0.0):
        shapes = {"embeddings.word.weight": (300, 400), "layer.0.weight": (64, 64)}
        tensors = {}
        for name, shape in shapes.items():
            new = torch.randn(shape, generator=generator)
            if base is not None:
                moves = torch.rand(shape, generator=generator) < share
                new = torch.where(moves, base[name] + 0.01 * new, base[name])
            tensors[name] = new
        return tensors

    base = model()
    for name, tensors in {
        "base": base,
        "a": model(base, 0.02),
        "b": model(base, 0.05),
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for name in "ab":
        run("diff", tmp_path / "base", tmp_path / name, "-o", tmp_path / f"{name}.safetensors")
    return tmp_path


def module(tensors):
    model = torch.nn.Module()
    for name, value in tensors.items():
        *way, last = name.split(".")
        inner = model
        for step in way:
            if not hasattr(inner, step):
                inner.add_module(step, torch.nn.Module())
            inner = getattr(inner, step)
        inner.register_parameter(last, torch.nn.Parameter(value.clone()))
    return model


def test_diff_info_and_verify(world):
    base, tuned = (load_file(world / n / "model.safetensors") for n in ("base", "a"))
    changed = sum(int((base[n] != tuned[n]).sum()) for n in base)
    found = document("info", world / "a.safetensors")
    assert found["nnz"] == changed
    assert found["numel"] == sum(t.numel() for t in base.values())
    assert [p["name"] for p in found["params"]] == sorted(base)
    assert sum(p["nnz"] for p in found["params"]) == changed
    assert f"{changed:,} of" in run("info", world / "a.safetensors").output
    (one,) = document("verify", world / "a.safetensors", "--base", world / "base")
    assert one["ok"]
    assert one["base"] == "fits"
    assert one["content_id"] == found["content_id"]


def test_diff_takes_the_largest(world):
    found = document(
        *("diff", world / "base", world / "b", "--density", 0.01, "--lang", "sw"),
        *("-o", world / "top.safetensors"),
    )
    delta = sf.SparseDelta.load(world / "top.safetensors")
    whole = sf.SparseDelta.load(world / "b.safetensors")
    assert delta.meta["lang"] == "sw"
    assert found["nnz"] == delta.nnz == int(0.01 * delta.layout.numel)
    assert delta.val.abs().min() >= whole.val.abs().sort().values[-delta.nnz]


def test_verify_says_which_fails_and_goes_on(world):
    raw = bytearray((world / "a.safetensors").read_bytes())
    raw[-1] ^= 1
    (world / "damaged.safetensors").write_bytes(raw)
    files = [world / f"{name}.safetensors" for name in ("damaged", "missing", "b")]
    found = document("verify", *files, code=1)
    assert [item["ok"] for item in found] == [False, False, True]
    assert "damaged.safetensors" in found[0]["error"]
    # An SFT of another base model.
    (found,) = document("verify", files[2], "--base", world / "a", code=1)
    assert "base model" in found["error"]
    assert "FAILED" in run("verify", *files, code=1).output


def test_compose_and_apply_give_the_bits_of_the_library(world):
    deltas = [sf.SparseDelta.load(world / f"{n}.safetensors") for n in "ab"]
    base = load_file(world / "base" / "model.safetensors")
    files = [world / "a.safetensors", world / "b.safetensors"]
    model = module(base)
    with sf.compose(model, deltas, weights=[0.5, -2.0]):
        wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = ["-w", 0.5, "-w", -2.0]
    run("apply", world / "base", *files, *weights, "-o", world / "out")
    found = load_file(world / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    # Composed first and applied then: the same.
    run("compose", *files, *weights, "-o", world / "ab.safetensors")
    run("apply", world / "base", world / "ab.safetensors", "-o", world / "out2")
    assert (world / "out2/model.safetensors").read_bytes() == (
        world / "out/model.safetensors"
    ).read_bytes()


def test_merge_by_a_rule(world):
    files = [world / "a.safetensors", world / "b.safetensors"]
    out = world / "m.safetensors"
    run("merge", *files, "--rule", "dare", "--option", "p=0.5", "--option", "seed=3", "-o", out)
    merged = sf.SparseDelta.load(out)
    assert merged == sf.merge(map(sf.SparseDelta.load, files), rule="dare", p=0.5, seed=3)
    assert merged.meta["recipe"]["method"] == "merge:dare"
    again = run("merge", *files, "-o", out, code=1)
    assert "--force" in again.output
    run("merge", *files, "-o", out, "--force")
    assert (
        "has no option"
        in run("merge", *files, "--option", "q=1", "-o", out, "--force", code=1).output
    )
    assert "magic" in run("merge", *files, "--rule", "magic", "-o", out, "--force", code=1).output
    assert sf.SparseDelta.load(out) == sf.merge(map(sf.SparseDelta.load, files))
    run("merge", *files, "--option", "p", "-o", out, code=2)


def test_overlap(world):
    files = [world / "a.safetensors", world / "b.safetensors"]
    found = sf.overlap([sf.SparseDelta.load(file) for file in files])
    shown = run("overlap", *files, "--csv", world / "o.csv", "--plot", world / "o.png")
    assert "a" in shown.output
    with open(world / "o.csv", newline="") as file:
        (pair,) = [r for r in csv.DictReader(file) if (r["a"], r["b"]) == ("a", "b")]
    assert int(pair["both"]) == found.both[0, 1]
    assert (world / "o.png").read_bytes().startswith(b"\x89PNG")
    document("overlap", *files)
    assert "nonsense" in run("overlap", *files, "--metric", "nonsense", code=1).output


def test_convert_to_the_reference_library_and_back(world):
    legacy, back = world / "pytorch_diff.bin", world / "back.safetensors"
    run("convert", world / "a.safetensors", legacy)
    run("convert", legacy, back, "--base", world / "base", "--base-id", "me/base", "--lang", "sw")
    before, after = sf.SparseDelta.load(world / "a.safetensors"), sf.SparseDelta.load(back)
    assert {n: (i.tolist(), v.tolist()) for n, i, v in after} == {
        n: (i.tolist(), v.tolist()) for n, i, v in before
    }
    assert after.meta["lang"] == "sw"
    assert after.meta["base"]["id"] == "me/base"
    assert after.meta["base"]["digest_f32"] == before.meta["base"]["digest_f32"]


def test_convert_to_a_patch(world):
    needs = run("convert", world / "a.safetensors", world / "p", "--to", "patch", code=1)
    assert "--base" in needs.output
    out = world / "p.safetensors"
    run("convert", world / "a.safetensors", out, "--to", "patch", "--base", world / "base")
    patch, tuned = load_file(out), load_file(world / "a" / "model.safetensors")
    for name, value in tuned.items():
        at = patch[f"{name}.indices"].long()
        assert torch.equal(patch[f"{name}.values"], value.reshape(-1)[at])


@pytest.mark.parametrize("command", ["info", "verify", "compose", "overlap"])
def test_a_missing_file_is_one_line(command, tmp_path):
    options = ["-o", tmp_path / "out.safetensors"] if command == "compose" else []
    result = run(command, tmp_path / "none.safetensors", *options, code=1)
    assert "none.safetensors" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_labels_are_short_and_distinct():
    assert cli._labels(["x/sw.safetensors", "y/ner.safetensors"]) == ["sw", "ner"]
    assert cli._labels(["x/sft.safetensors", "y/sft.safetensors"]) == ["x/sft", "y/sft"]
    assert cli._labels(["a", "a"]) == ["a (0)", "a (1)"]
