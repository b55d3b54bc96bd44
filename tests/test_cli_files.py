"""The commands that work on SFT files, from two checkpoints on disk to a merged one."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparse_ft as sf

typer_testing = pytest.importorskip("typer.testing")

from sparse_ft import cli  # noqa: E402  (needs typer)
from sparse_ft.cli import shared  # noqa: E402


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
    assert found["bytes"] == (world / "a.safetensors").stat().st_size
    moved = torch.cat([(tuned[n] - base[n]).reshape(-1) for n in base])
    assert (found["value_min"], found["value_max"]) == (moved.min().item(), moved.max().item())
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
    shown = run("verify", *files, code=1).output.splitlines()
    assert [line.partition(": ")[0] for line in shown] == [str(file) for file in files]
    assert ["FAILED" in line for line in shown] == [True, True, False]
    (shown,) = run("verify", files[2], "--base", world / "a", code=1).output.splitlines()
    assert shown.startswith(f"{files[2]}: FAILED: made for another base model")
    assert "--" not in shown
    # A tensor that the model lacks: which SFT, and no word of Python.
    save_file({"w": torch.ones(3)}, world / "small.safetensors")
    small = ("--base", world / "small.safetensors")
    (shown,) = run("verify", files[2], *small, code=1).output.splitlines()
    assert shown.startswith(f"{files[2]}: FAILED: {small[1]} has no tensor 'embeddings")
    assert "which the SFT has" in shown


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
    run("convert", world / "a.safetensors", "-o", legacy)
    labels = ("--base-id", "me/base", "--lang", "sw", "--role", "language", "--license", "mit")
    run("convert", legacy, "-o", back, "--base", world / "base", *labels)
    before, after = sf.SparseDelta.load(world / "a.safetensors"), sf.SparseDelta.load(back)
    assert {n: (i.tolist(), v.tolist()) for n, i, v in after} == {
        n: (i.tolist(), v.tolist()) for n, i, v in before
    }
    assert [after.meta[key] for key in ("lang", "role", "license")] == ["sw", "language", "mit"]
    assert after.meta["base"]["id"] == "me/base"
    assert after.meta["base"]["digest_f32"] == before.meta["base"]["digest_f32"]
    # A folder, which is created.
    run("convert", world / "a.safetensors", "-o", world / "new", "--to", "legacy")
    assert (world / "new" / "pytorch_diff.bin").read_bytes() == legacy.read_bytes()
    again = ("convert", world / "a.safetensors", "-o", world / "new", "--to", "legacy")
    assert "--force" in run(*again, code=1).output
    run(*again, "--force")


def test_convert_to_a_patch(world):
    patching = ("convert", world / "a.safetensors", "--to", "patch", "-o")
    needs = run(*patching, world / "p", code=1)
    assert "--base" in needs.output
    out = world / "p.safetensors"
    run(*patching, out, "--base", world / "base")
    patch, tuned = load_file(out), load_file(world / "a" / "model.safetensors")
    for name, value in tuned.items():
        at = patch[f"{name}.indices"].long()
        assert torch.equal(patch[f"{name}.values"], value.reshape(-1)[at])
    # And back, as an SFT that replaces.
    for command in ("info", "verify"):
        said = run(command, out, code=1).output
        assert "is no SFT, but a patch of absolute values; sparse-ft convert" in said
    run("convert", out, "-o", world / "back.safetensors", "--lang", "sw")
    back = sf.SparseDelta.load(world / "back.safetensors")
    assert (back.kind, back.meta["lang"]) == ("replace", "sw")
    assert back.support == sf.SparseDelta.load(world / "a.safetensors").support
    for name, value in tuned.items():
        assert torch.equal(back.values(name), value.reshape(-1)[back.indices(name)])


@pytest.mark.parametrize("command", ["info", "verify", "compose", "overlap"])
def test_a_missing_file_is_one_line(command, tmp_path):
    options = ["-o", tmp_path / "out.safetensors"] if command == "compose" else []
    file = tmp_path / "none.safetensors"
    result = run(command, file, *([file] if command == "overlap" else []), *options, code=1)
    assert "none.safetensors" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_labels_are_short_and_distinct():
    assert shared.labels_of(["x/sw.safetensors", "y/ner.safetensors"]) == ["sw", "ner"]
    assert shared.labels_of(["x/sft.safetensors", "y/sft.safetensors"]) == ["x/sft", "y/sft"]
    assert shared.labels_of(["a", "a"])[0].endswith("a (0)")
    assert shared.labels_of(["o.v1", "o.v2"]) == ["o.v1", "o.v2"]


def test_labels_of_the_folder_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "swahili").mkdir()
    monkeypatch.chdir(tmp_path / "swahili")
    assert shared.labels_of([".", "../hausa"]) == ["swahili", "hausa"]


def test_compose_with_a_base_records_its_digest(world):
    files, out = [world / "a.safetensors", world / "b.safetensors"], world / "ab.safetensors"
    assert "--base BASE records it" in run("compose", *files, "-o", out).stderr
    run("compose", *files, "-o", out, "--force", "--base", world / "base")
    (found,) = document("verify", out, "--base", world / "base")
    assert found["base"] == "fits"
    document("verify", out, "--base", world / "a", code=1)
    refused = run("compose", *files, "-o", out, "--force", "--base", world / "a", code=1)
    assert "base model" in refused.output


def test_arguments_of_merge_are_no_options(world):
    files = [world / "a.safetensors", world / "b.safetensors"]
    for option in ("heads=1", "weights=1", "rule=ties", "deltas=1", "base=x"):
        found = run("merge", *files, "--option", option, "-o", world / "m.safetensors", code=1)
        assert "no option" in found.output


def task_world(folder):
    """A language model, and a token classifier that was made from it."""
    generator = torch.Generator().manual_seed(1)

    def new(*shape):
        return torch.randn(shape, generator=generator)

    backbone = {"m.emb.weight": new(300, 40), "m.layer.weight": new(40, 40), "m.b": new(40)}
    base = backbone | {"lm_head.bias": new(300), "lm_head.dense.weight": new(40, 40)}
    task = {n: t + 0.1 * (new(*t.shape) > 1) for n, t in backbone.items()}
    task |= {"classifier.weight": new(7, 40), "classifier.bias": new(7)}
    language = {n: t + 0.1 * (new(*t.shape) > 1) for n, t in base.items()}
    for name, tensors in {"mlm": base, "task": task, "lang": language}.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text('{"torch_dtype": "float32"}')
    return task


def test_a_task_model_from_a_language_model_to_a_merged_one(tmp_path):
    task = task_world(tmp_path)
    diff = ("diff", tmp_path / "mlm", tmp_path / "task", "-o", tmp_path / "ner.safetensors")
    # What the task's model alone has must be spoken for.
    said = run(*diff, code=1).output
    assert "2 tensors ('classifier.bias', 'classifier.weight')" in said
    assert "--heads" in said
    labels = ("--role", "task", "--task", "ner", "--license", "mit")
    for spelled in ("--head", "--heads"):
        result = run(*diff, spelled, "classifier*", "-k", 500, *labels, "--force")
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("sparse-ft: warning: left out 2 tensors ('lm_head.bias', 'lm_head.de")
    ner = sf.SparseDelta.load(tmp_path / "ner.safetensors")
    assert ner.nnz == 500
    assert ner.layout.names == ("m.b", "m.emb.weight", "m.layer.weight")
    assert {n: torch.equal(h, task[n]) for n, h in ner.heads.items()} == {
        "classifier.bias": True,
        "classifier.weight": True,
    }
    assert [ner.meta[key] for key in ("role", "task", "license")] == ["task", "ner", "mit"]
    lang = tmp_path / "sw.safetensors"
    run("diff", tmp_path / "mlm", tmp_path / "lang", "-o", lang, "--exclude", "lm_head*")
    assert sf.SparseDelta.load(lang).layout.names == ner.layout.names
    only = ("--only", "m.layer*", "--only", "m.b", "--exclude", "m.b")
    run("diff", tmp_path / "mlm", tmp_path / "lang", "-o", lang, "--force", *only)
    assert sf.SparseDelta.load(lang).layout.names == ("m.layer.weight",)

    # The heads: left out with a word, or put on, by path or by name.
    files = (lang, tmp_path / "ner.safetensors")
    apply = ("apply", tmp_path / "mlm", *files)
    said = run(*apply, "-o", tmp_path / "plain")
    assert said.stderr.startswith(f"sparse-ft: note: the heads of {files[1]} are left out; --heads")
    assert not any("classifier" in n for n in load_file(tmp_path / "plain/model.safetensors"))
    for i, name in enumerate((files[1], "ner")):
        said = run(*apply, "--heads", name, "-o", tmp_path / f"out{i}", "--dtype", "bf16")
        assert f"num_labels={len(task['classifier.bias'])})" in said.stderr
        found = load_file(tmp_path / f"out{i}" / "model.safetensors")
        assert torch.equal(found["classifier.weight"], task["classifier.weight"].bfloat16())
        assert {t.dtype for t in found.values()} == {torch.bfloat16}
    json.loads(run(*apply, "--heads", "ner", "-o", tmp_path / "j", "--json").stdout)
    said = run(*apply, "--heads", "sw", "-o", tmp_path / "no", code=1).output
    assert f"--heads sw: this SFT has no heads; {files[1]} has" in said
    said = run(*apply, "--heads", "hausa", "-o", tmp_path / "no", code=1).output
    assert "none of the SFTs given" in said


def test_what_says_nothing_of_the_models(world):
    out = ("-o", world / "x.safetensors")
    said = run("diff", world / "base", world / "base", *out, code=1).output
    assert said.startswith("sparse-ft: base and tuned are equal")
    both = ("-k", 3, "--density", 0.1)
    said = run("diff", world / "base", world / "a", *both, *out, code=1).output
    assert "give k or density, not both" in said
    said = run("diff", "org/model", world / "a", *out, code=1).output
    assert "hf download org/model" in said
    said = run("verify", world / "a.safetensors", "--base", "org/model", code=1).output
    assert "hf download org/model" in said
    # Before the work, not after it.
    for name, message in (("x", "must end in .safetensors"), ("no/x.safetensors", "create it")):
        said = run("diff", world / "base", world / "none", "-o", world / name, code=1).output
        assert message in said
    assert not (world / "x.safetensors").exists()


def test_weights_are_explained(world):
    files, out = [world / "a.safetensors", world / "b.safetensors"], world / "x.safetensors"
    said = run("compose", "-w", 1, 0.5, *files, "-o", out, code=1).output
    assert "0.5: there is no such file. For a weight, repeat -w: -w 1 -w 0.5" in said
    said = run("merge", *files, "-w", 1, "-o", out, code=1).output
    assert said == "sparse-ft: 1 weights (-w) for 2 SFTs; give one for each, or none\n"
    said = run("merge", *files, "-w", 1, "-w", "nan", "-o", out, code=1).output
    assert said.startswith(f"sparse-ft: the weight of {files[1]} must be")
    said = run("merge", *files, "--rule", "dare", "-o", out, code=1).output
    assert said == "sparse-ft: rule 'dare' needs p, such as --option p=0.9\n"
    assert not out.exists()
    said = run("compose", files[0], files[0], "-o", out).stderr
    assert said.startswith(f"sparse-ft: warning: {files[0]} is the same SFT as {files[0]}")


def test_overlap_overwrites_nothing(world):
    files = [world / "a.safetensors", world / "b.safetensors"]
    (world / "o.csv").write_text("mine")
    for option, name in (("--csv", "o.csv"), ("--plot", "o.csv")):
        said = run("overlap", *files, option, world / name, code=1).output
        assert "--force" in said
    assert (world / "o.csv").read_text() == "mine"
    run("overlap", *files, "--csv", world / "o.csv", "--force")
    assert (world / "o.csv").read_text() != "mine"
    said = run("overlap", *files, "--plot", world / "no" / "o.png", code=1).output
    assert f"there is no folder {world / 'no'}" in said
    assert "at least two" in run("overlap", files[0], code=1).output


def test_reports_fit_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    name = "roberta.encoder.layer.11.attention.output.LayerNorm.weight.and.then.some.more"
    delta = sf.SparseDelta(
        sf.Support.from_indices(sf.Layout.of({name: (3000, 1000)}), {name: range(2500)}),
        torch.linspace(0.5, 1, 2500),
        meta={"task": "[bold]ner", "lang": "sw"},
    )
    delta.save("a.safetensors")
    merged = run("compose", "a.safetensors", "-w", -0.5, "-o", "m.safetensors").output
    assert "0.0833%" in merged
    shown = run("info", "m.safetensors").output
    content_id = sf.SparseDelta.load("m.safetensors").content_id
    for text in (merged, shown):
        assert max(map(len, text.splitlines())) <= 80
        assert f"{content_id[:16]}…" in text
        assert not set(text) & set("│┃╭┌")
    assert f"-0.5 × {delta.content_id[:16]}…" in shown
    # Long names are folded, not cut.
    rows = shown[shown.index("most entries:") :].splitlines()[2:]
    assert "".join(row.split()[-1] for row in rows) == name
    assert rows[0].split()[:3] == ["2,500", "100.0%", "0.08%"]
    assert shown.index("most entries:") < shown.index(name[:40])
    assert document("info", "m.safetensors")["content_id"] == content_id
    # Brackets are no markup.
    assert "[bold]ner" in run("info", "a.safetensors").output


def test_shira_there_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "base")
    name = "bert.encoder.layer.0.output.dense.weight"
    with torch.no_grad():
        model.get_parameter(name)[:3, 4] += 1
    model.save_pretrained(tmp_path / "tuned")
    file, adapter = tmp_path / "a.safetensors", tmp_path / "adapter"
    base = ("--base", tmp_path / "base")
    run("diff", tmp_path / "base", tmp_path / "tuned", "-o", file)
    write = ("convert", file, "--to", "shira", *base, "-o", adapter)
    run(*write)
    before = (adapter / "adapter_model.safetensors").read_bytes()
    assert "--force replaces it" in run(*write, code=1).output
    (adapter / "adapter_model.safetensors").write_bytes(b"old")
    (adapter / "mine.txt").write_text("mine")
    run(*write, "--force")
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    assert (adapter / "mine.txt").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "tuned", "adapter", "a.safetensors"}
    assert "adapter of PEFT; sparse-ft convert --base" in run("info", adapter, code=1).output
    run("convert", adapter, *base, "-o", tmp_path / "back.safetensors")
    back = sf.SparseDelta.load(tmp_path / "back.safetensors")
    assert back.indices(name).tolist() == sf.SparseDelta.load(file).indices(name).tolist()
