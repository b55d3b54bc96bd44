"""Every command line of the documents runs, on a tiny model and a few steps."""

import glob
import os
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("seqeval")
pytest.importorskip("matplotlib")

from tiny_bases import SPECIAL, WORDS, tokenizer_of_words, write_data
from typer.testing import CliRunner

import sparse_ft as sf
from sparse_ft import legacy
from sparse_ft.cli import app
from sparse_ft.loop import Length
from sparse_ft.tasks.recipes import RECIPES, Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
# Elsewhere: installing is test_packaging's, the quickstart test_quickstart's, the rest of the
# kernel layer and the benchmarks have tests of their own.
ELSEWHERE = ("pip install", "pytest", "python -m", "sparse-ft quickstart", "sparse-ft info mine")


def lines_of(page):
    text = (ROOT / page).read_text("utf-8")
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            line = line.partition(" #")[0].strip()
            if line and not line.startswith(ELSEWHERE):
                found.append(line)
    return found


WITH_COMMANDS = [page for page in PAGES if lines_of(page)]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """What the documents suppose: base models, tuned ones, data, SFTs."""
    from transformers import (
        XLMRobertaConfig,
        XLMRobertaForMaskedLM,
        XLMRobertaForTokenClassification,
    )

    folder = tmp_path_factory.mktemp("there")
    base = folder / "xlm-roberta-base"
    config = XLMRobertaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=66,
        type_vocab_size=1, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    XLMRobertaForMaskedLM(config).save_pretrained(base)
    tokenizer_of_words(base)
    tuned = XLMRobertaForMaskedLM.from_pretrained(base)
    tagger = XLMRobertaForTokenClassification.from_pretrained(base, num_labels=3)
    with torch.no_grad():
        for model in (tuned, tagger):
            for parameter in model.roberta.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    tuned.save_pretrained(folder / "my-swahili-model")
    tagger.save_pretrained(folder / "my-ner-model")
    write_data(folder)
    copies = {
        "text.txt": ["sw.txt", "en.txt", "ha.txt"],
        "train.conll": ["ner-train.conll", "ner.conll", "conll2003.conll"],
        "test.conll": [
            *("ner-dev.conll", "ner-sw.conll", "masakhaner-sw.conll", "masakhaner-ha.conll"),
        ],
        "train.conllu": ["en-train.conllu"],
        "test.conllu": ["en-dev.conllu"],
    }
    for name, others in copies.items():
        for other in others:
            (folder / other).write_bytes((folder / name).read_bytes())
    table = (folder / "train.csv").read_text("utf-8").replace("text,label", "review,stars")
    (folder / "reviews.csv").write_text(table, "utf-8")
    page = (ROOT / "docs" / "own-data.md").read_text("utf-8")
    (folder / "sources.json").write_text(*re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    for name in ("sw", "en", "ha", "yo", "swahili", "hausa"):
        some = sf.diff(
            base, folder / "my-swahili-model", density=0.05, exclude="lm_head*", lang="sw"
        )
        some.save(folder / f"{name}.safetensors")
    legacy.write(some, folder / "pytorch_diff.bin")
    ner = sf.diff(base, folder / "my-ner-model", density=0.05, heads="classifier*", task="ner")
    ner.save(folder / "ner.safetensors")
    return folder


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_run(page, there, tmp_path, monkeypatch):
    for item in there.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    for name, preset in RECIPES.items():
        short = preset.changed(density=0.1, max_length=32, evaluate_every=2)
        monkeypatch.setitem(RECIPES, name, short)
    monkeypatch.setattr(Recipe, "lengths", lambda self: (Length(steps=2), Length(steps=3)))
    for line in lines_of(page):
        program, *words = shlex.split(line)
        assert program == "sparse-ft", line
        expanded = [f for word in words for f in (sorted(glob.glob(word)) or [word])]
        for flag, output in pairwise(expanded):
            if flag in ("-o", "--output") and os.path.isfile(output):
                os.unlink(output)
        result = CliRunner().invoke(app, expanded)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    if page == "docs/own-data.md":
        (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
        exec(compile(block, page, "exec"), {})


def test_pages_with_commands_are_found():
    assert {"README.md", "docs/own-data.md", "docs/api.md", "docs/exchange.md"} <= {*WITH_COMMANDS}
    assert len(lines_of("docs/own-data.md")) == 8
