"""families: every family of models, with every head, on tiny configurations.

`docs/families.md` holds the table that comes out of this: `python tests/test_model_families.py`
prints it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_bits
from safetensors import safe_open
from torch import Tensor, nn

import sparse_ft as sf
from sparse_ft.families import aliases, backbone, backbone_names, is_norm, named_parameters

transformers = pytest.importorskip("transformers")
from tiny_models import FAMILIES, inputs, logits, tiny  # noqa: E402  it needs transformers

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "families.md"
CASES = [(f, head) for f, its in FAMILIES.items() for head in (its.language, *its.tasks)]
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
# Encoder–decoders that transformers 4 ties again when it loads them; its mT5 is not tied at all.
RETIED = {"T5", "NLLB", "BART"} if BEFORE_5 else set()
# How the matrix that gives the logits is called.
OUTPUT = {
    **dict.fromkeys(FAMILIES, "lm_head.weight"),
    "BERT": "cls.predictions.decoder.weight",
    "XLM-R": "lm_head.decoder.weight",
    "DistilBERT": "vocab_projector.weight",
    "ModernBERT": "decoder.weight",
}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By every name."""
    return dict(model.named_parameters(remove_duplicate=False))


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The names of tied parameters, together."""
    names: dict[int, set[str]] = {}
    for name, parameter in parameters(model).items():
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def bare(model: Any, name: str) -> str:
    """A parameter's name in the model without a head."""
    return name.removeprefix(f"{model.base_model_prefix}.").removeprefix("model.")


@pytest.mark.parametrize(("family", "head"), CASES)
def test_norms_are_frozen_and_nothing_else(family, head):
    model = tiny(family, head)
    norms = {n for n in parameters(model) if re.search(r"norm|ln_", n, re.IGNORECASE)}
    assert norms
    assert set(sf.freeze_norms(model)) == norms
    assert {n for n, p in parameters(model).items() if not p.requires_grad} == norms


@pytest.mark.parametrize(("family", "head"), CASES)
def test_the_backbone_is_what_a_bare_model_has(family, head):
    model = tiny(family, head)
    inside, named = backbone_names(model), named_parameters(model)
    found = {bare(model, n) for n in inside}
    whole = {n for n, _ in tiny(family, "Model").named_parameters()}
    assert found <= whole
    # Language models have no pooler, T5's token classifier no decoder.
    assert {n for n in whole - found if not n.startswith(("pooler.", "decoder."))} == set()
    # Also where the output matrix is tied, the input embeddings are there, once.
    embedding = model.get_input_embeddings().weight
    (name,) = (n for n, p in named.items() if p is embedding)
    assert name in inside
    assert bare(model, name) in whole


@pytest.mark.parametrize(("family", "head"), CASES)
def test_a_tied_parameter_has_its_name_in_the_backbone(family, head, tmp_path):
    model = tiny(family, head)
    inner = backbone(model)
    prefix = "" if inner is model else f"{model.base_model_prefix}."
    assert inner is model or inner is model.base_model
    own = {f"{prefix}{n}" for n, _ in inner.named_parameters()}
    named = named_parameters(model)
    assert own <= named.keys()
    assert [id(p) for p in named.values()] == [id(p) for p in model.parameters()]
    assert ties(model) == {frozenset({own, *more}) for own, more in aliases(model).items()}
    # The files of transformers have the same names.
    if head == FAMILIES[family].language:
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert set(file.keys()) - dict(model.named_buffers()).keys() == named.keys()


@pytest.mark.filterwarnings("ignore:decouple_output_embeddings. with this version")
@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_matrix_is_decoupled(family, trained, tmp_path):
    model, name = tiny(family), OUTPUT[family]
    before, tied = logits(model), ties(model)
    assert sf.decouple_output_embeddings(model) == [name]
    assert torch.equal(logits(model), before)
    output, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert output.data_ptr() != embedding.data_ptr()
    assert {n for n, p in parameters(model).items() if not p.requires_grad} == {name}
    assert name not in backbone_names(model)
    # Encoder and decoder, and biases, are tied as before.
    assert ties(model) == {group - {name} for group in tied if len(group - {name}) > 1}
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape))
    values = {n: p.detach().clone() for n, p in parameters(model).items()}
    after = logits(model)
    model.tie_weights()
    assert model.get_output_embeddings().weight is output
    assert torch.equal(logits(model), after)
    if family in RETIED:
        return
    for _ in range(2):
        # Saving and loading twice, as what is loaded is decoupled again for more training.
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path).eval()
        assert all(p.requires_grad for p in model.parameters())
        assert sf.decouple_output_embeddings(model) == [name]
        model.tie_weights()
        for n, parameter in parameters(model).items():
            assert_bits(parameter.detach(), values[n], n)
        assert torch.equal(logits(model), after)
        assert {n for n, p in parameters(model).items() if not p.requires_grad} == {name}


@pytest.mark.parametrize("family", sorted(RETIED))
def test_what_transformers_4_cannot_keep_is_said(family):
    with pytest.warns(UserWarning, match="has its output matrix tied again when it is loaded"):
        sf.decouple_output_embeddings(tiny(family))


def train(phase):
    """Two steps that predict the input."""
    model = phase.model
    optimizer = phase.optimizer(lr=1e-2, max_grad_norm=1.0)
    for _ in range(2):
        given = inputs(model)
        out = model(**given).logits
        nn.functional.cross_entropy(out.flatten(0, 1), given["input_ids"].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings(
    "ignore:decouple_output_embeddings. with this version", "ignore:SparseDelta.bind. the .*lacks"
)
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_sft_fits_every_model_of_the_family(family, decoupled):
    model = tiny(family)
    if decoupled:
        sf.decouple_output_embeddings(model)
    sf.freeze_norms(model)
    delta = sf.LotteryTicket(model, density=0.05, l1=0.1).fit(train, role="language", lang="xx")
    assert delta.nnz
    assert OUTPUT[family] not in delta.layout
    embedding = model.get_input_embeddings().weight
    (name,) = (n for n, p in named_parameters(model).items() if p is embedding)
    assert name in delta.layout
    values = {bare(model, n): p.detach() for n, p in parameters(model).items()}
    its = FAMILIES[family]
    for head in (its.language, *its.tasks, "Model") if decoupled else its.tasks[:1]:
        other = tiny(family, head)
        with torch.no_grad():
            for n, parameter in parameters(other).items():
                value = values.get(bare(other, n))
                if value is not None and value.shape == parameter.shape:
                    parameter.copy_(value)
        if decoupled and OUTPUT[family] in parameters(other):
            sf.decouple_output_embeddings(other)
        names = {bare(other, n): n for n in named_parameters(other)}
        expected = {n: p.detach().clone() for n, p in named_parameters(other).items()}
        given: Any = {}
        if head == "ForTokenClassification" and family in ("T5", "mT5"):
            # Of these transformers has the encoder alone.
            with pytest.raises(sf.SFTError, match=r"no parameter '.*decoder\..*unused=\"ignore\""):
                sf.compose(other, [delta])
            given = {"unused": "ignore", "allow_base_mismatch": True}
        elif head == "Model" and family == "Gemma 3" and BEFORE_5:
            given = {"key_map": {"model.": ""}}
        for n, _, _ in delta:
            if (known := names.get(bare(model, n))) is not None:
                expected[known] += delta.dense(n)
        check_composed(other, delta, expected, **given)


def check_composed(
    model: nn.Module, delta: sf.SparseDelta, expected: dict[str, Tensor], **given: Any
) -> None:
    before = {n: p.detach().clone() for n, p in named_parameters(model).items()}
    assert any(not torch.equal(value, expected[n]) for n, value in before.items())
    with sf.compose(model, [delta], **given):
        for n, parameter in named_parameters(model).items():
            assert_bits(parameter.detach(), expected[n], n)
    for n, parameter in named_parameters(model).items():
        assert_bits(parameter.detach(), before[n], n)


# --- the table ----------------------------------------------------------------------------------


def table(language: bool) -> str:
    """A table of docs/families.md: the models with a language-model head, or those with others."""
    heading = ["family", "model", "backbone", "norms", "one parameter", "output matrix", "heads"]
    lines = [heading, ["---"] * len(heading)]
    for family, head in CASES:
        if language == (head == FAMILIES[family].language):
            lines.append([family, *_row(tiny(family, head), OUTPUT[family])])
    if not language:
        lines = [line[:5] + line[6:] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(model: Any, output_name: str) -> list[str]:
    inside, output = backbone_names(model), model.get_output_embeddings()
    kinds = sorted({type(m).__name__ for m in model.modules() if is_norm(m)})
    tied = [" = ".join(_code([own, *more])) for own, more in aliases(model).items()]
    its_own = output is not None and output.weight is not model.get_input_embeddings().weight
    return [
        *_code([type(model).__name__]),
        f"all but `{[*model._modules][-1]}`"
        if backbone(model) is model
        else f"`{model.base_model_prefix}`",
        f"{sum(map(is_norm, model.modules()))} {', '.join(_code(kinds))}",
        "; ".join(tied) or "none",
        f"`{output_name}`, {'apart already' if its_own else 'copied'}",
        ", ".join(_code([n for n in named_parameters(model) if n not in inside | {output_name}]))
        or "none",
    ]


def _code(names: list[str]) -> list[str]:
    """As code; `a.weight` and `a.bias` as `a.*`, where both are there."""
    whole = {n.removesuffix(".bias") for n in names if n.endswith(".bias")}
    folded = (
        f"{stem}.*"
        if (stem := re.sub(r"\.(weight|bias)$", "", n)) in whole and f"{stem}.weight" in names
        else n
        for n in names
    )
    return [f"`{n}`" for n in dict.fromkeys(folded)]


@pytest.mark.skipif(BEFORE_5, reason="the tables are those of transformers 5")
@pytest.mark.parametrize("language", [True, False])
def test_the_tables_are_what_the_code_finds(language):
    assert table(language) in DOCUMENT.read_text("utf-8")


if __name__ == "__main__":
    print(table(True), table(False), sep="\n\n")
