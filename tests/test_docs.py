"""The documents: what they show as Python runs, what they link to exists."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"]


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text("utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(40, 40)
        self.out = nn.Linear(40, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)))


def for_a_trainer():
    """A function that loads a tiny model, data for it, and SFTs of two languages."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    import sparse_ft as sf

    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        num_labels=3,
    )

    def load_model():
        torch.manual_seed(0)
        return transformers.BertForTokenClassification(config)

    def language():
        model = load_model()
        base = sf.snapshot(model)
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight[:2] += 0.1
        return sf.SparseDelta.between(base, model)

    language().save("en.safetensors")
    data = [
        {"input_ids": torch.randint(30, (5,)), "labels": torch.randint(3, (5,))} for _ in range(24)
    ]
    names = {"load_model": load_model, "dev_data": data[:8], "swahili_sft": language()}
    return names | dict.fromkeys(["train_data", "english", "swahili", "basque"], data)


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "docs/api.md", "docs/concepts.md", "docs/ops.md", "docs/merging.md"),
        *("docs/serving.md", "docs/selection.md", "docs/composing.md"),
        "docs/trainer.md",
    ],
)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A page that adds a rule adds it for itself.
    merging = importlib.import_module("sparse_ft.merge")
    monkeypatch.setattr(merging, "RULES", dict(merging.RULES))
    torch.manual_seed(0)
    model = Tiny()
    x, y = torch.randn(64, 40), torch.randint(3, (64,))

    def train(model, optimizer=None):
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def evaluate(model):
        return (model(x).argmax(1) == y).double().mean().item()

    # What the reader is told to have: a model, a loop, files of other SFTs, a batch.
    names = {"model": model, "train": train, "evaluate": evaluate, "predict": model, "batch": x}
    names |= {"x": x, "inputs": x, "out": torch.zeros(64, 3), "outputs": torch.zeros(64, 3)}
    data = torch.utils.data.TensorDataset(x, y)
    names["loader"] = torch.utils.data.DataLoader(data, 16, shuffle=True)
    names["loss"] = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    names["languages"] = ["swahili", "hausa"]
    names["language_of_each"] = names["languages_of_the_batch"] = ["swahili", "hausa"] * 32
    if name in ("README.md", "docs/serving.md", "docs/composing.md"):
        import sparse_ft as sf

        base = sf.snapshot(model)
        (tmp_path / "sfts").mkdir()
        for other in ("swahili", "hausa", "ner"):
            train(model)
            tuned = {n: p.detach() for n, p in model.named_parameters() if n != "out.bias"}
            head = {"out.bias": model.out.bias} if other == "ner" else {}
            delta = sf.SparseDelta.between({n: base[n] for n in tuned}, tuned, heads=head)
            delta.save(f"{other}.safetensors")
            delta.save(f"sfts/{other}.safetensors")
        base.restore(model)
    if name == "docs/trainer.md":
        names |= for_a_trainer()
    for block in blocks(ROOT / name):
        exec(compile(block, name, "exec"), names)


def test_proofs_are_there():
    """The checklist of the method names tests: each must exist."""
    page = (ROOT / "docs" / "method.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", page)
    rows = [line for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 30))
    assert all(re.search(r"`test_\w+\.py::test_\w+`", row) for row in rows)
    for file, test in named:
        text = (ROOT / "tests" / file).read_text("utf-8")
        assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{file} has no {test}"


def test_blocks_on_files_of_others_run(tmp_path, monkeypatch):
    """exchange.md from its second block on, legacy-format.md and overlap.md."""
    pytest.importorskip("matplotlib")
    import numpy as np
    from safetensors.torch import load_file, save_file

    import sparse_ft as sf
    from sparse_ft import legacy

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Tiny()
    theta0 = sf.snapshot(model)
    with torch.no_grad():
        model.hidden.weight[:4] += 0.1 * torch.randn(4, 40)
    eligible = {"hidden.weight": theta0["hidden.weight"]}
    delta = sf.SparseDelta.between(eligible, {"hidden.weight": model.hidden.weight.detach()})
    theta0.restore(model)
    (tmp_path / "org-model-folder").mkdir()
    save_file(dict(model.state_dict()), "org-model-folder/model.safetensors")

    shira, patch, write_back = blocks(ROOT / "docs" / "exchange.md")[1:]
    names = {"delta": delta, "model": model}
    exec(compile(shira, "exchange.md", "exec"), names)
    assert names["delta"].indices("hidden.weight").tolist() == list(range(160))
    names["delta"] = delta
    exec(compile(patch, "exchange.md", "exec"), names)
    weight, name = model.hidden.weight.detach().clone(), "hidden.weight"
    exec(
        compile(write_back, "exchange.md", "exec"),
        {"weight": weight, "name": name, "patch": load_file("update.safetensors")},
    )
    with sf.compose(model, delta):
        assert torch.equal(weight, model.hidden.weight)

    for folder in ("xlmr-lang-sft-sw-small", "for-composable-sft"):
        (tmp_path / folder).mkdir()
    legacy.write(delta, "xlmr-lang-sft-sw-small")
    read, positions = blocks(ROOT / "docs" / "legacy-format.md")
    exec(compile(read, "legacy-format.md", "exec"), {"model": model})
    assert torch.equal(sf.SparseDelta.load("swahili.safetensors").val, delta.val)
    assert (tmp_path / "for-composable-sft" / "pytorch_diff.bin").exists()
    found = {"np": np, "index_steps": [np.int64(3), 5, 40], "size": (40, 40)}
    exec(compile(positions, "legacy-format.md", "exec"), found)
    # The first dimension varies fastest: 3, 8 and 48 = 8 + 40 · 1.
    assert [axis.tolist() for axis in found["coordinates"]] == [[3, 8, 8], [0, 0, 1]]

    (compare,) = blocks(ROOT / "docs" / "overlap.md")
    exec(compile(compare, "overlap.md", "exec"), dict.fromkeys(("swahili", "hausa", "ner"), delta))
    assert {p.name for p in tmp_path.glob("*.png")} == {"overlap.png", "layers.png"}


def test_every_page_with_python_runs_somewhere():
    """A page that gets its first block of Python needs a test that runs it."""
    tests = "".join(p.read_text("utf-8") for p in (ROOT / "tests").glob("*.py"))
    for path in DOCUMENTS:
        if blocks(path):
            assert f'"{path.name}"' in tests or f'"docs/{path.name}"' in tests, path.name
