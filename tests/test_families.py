"""families: norms, tied output embeddings and backbones of models as they come."""

import copy
from types import SimpleNamespace

import pytest
import torch
from oracles import assert_bits
from tiny_models import tiny
from torch import nn

import sparse_ft as sf
from sparse_ft.families import (
    aliases,
    backbone,
    backbone_names,
    is_norm,
    known_names,
    named_parameters,
    unwrapped,
)
from sparse_ft.select import eligible_parameters


class T5LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class MambaRMSNormGated(T5LayerNorm):
    pass


class LayerNorm2d(T5LayerNorm):
    pass


class NormalHead(T5LayerNorm):
    pass


class PreNorm(nn.Module):
    """A block with a norm in it, as some call it: not a norm itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fn = nn.Linear(4, 4)


def test_norms_of_every_name():
    norms = {
        "layer": nn.LayerNorm(4),
        "rms": nn.RMSNorm(4),
        "group": nn.GroupNorm(2, 4),
        "batch": nn.BatchNorm1d(4),
        "instance": nn.InstanceNorm2d(4, affine=True),
        "t5": T5LayerNorm(),
        "gated": MambaRMSNormGated(),
        "flat": LayerNorm2d(),
    }
    others = {"lin": nn.Linear(4, 4), "normal": NormalHead(), "emb": nn.Embedding(3, 4)}
    model = nn.ModuleDict({**norms, **others, "pre": PreNorm()})
    assert all(is_norm(m) for m in norms.values())
    assert not any(is_norm(m) for m in others.values())
    frozen = sf.freeze_norms(model)
    wanted = {n for n, _ in model.named_parameters() if n.split(".")[0] in norms}
    assert set(frozen) == wanted | {"pre.norm.weight", "pre.norm.bias"}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    # Those that were frozen before are not named again.
    assert sf.freeze_norms(model) == []


def test_by_name_as_the_reference_implementation():
    model = nn.ModuleDict(
        {"LayerNorm": nn.LayerNorm(4), "ln_f": nn.LayerNorm(4), "myLayerNormish": nn.Linear(4, 4)}
    )
    assert sf.freeze_norms(model, by_name=True) == [
        *("LayerNorm.weight", "LayerNorm.bias", "myLayerNormish.weight", "myLayerNormish.bias"),
    ]
    assert sf.freeze_norms(model) == ["ln_f.weight", "ln_f.bias"]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        sf.freeze_norms({})


def test_aliases_and_backbones_of_plain_modules():
    model = nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 4), "z": nn.Linear(4, 4)})
    model["z"].weight = model["y"].weight = model["x"].weight
    assert aliases(model) == {"x.weight": ["y.weight", "z.weight"]}
    assert backbone(model) is model
    assert backbone_names(model) == set(named_parameters(model))
    assert "y.weight" not in named_parameters(model)
    model.base_model_prefix = "nowhere"
    assert backbone(model) is model


# --- models of transformers: more of them in test_model_families.py -------------------------------


@pytest.mark.parametrize(
    ("family", "name"), [("XLM-R", "lm_head.decoder.weight"), ("GPT-2", "lm_head.weight")]
)
def test_training_leaves_the_output_matrix_alone(family, name):
    model = tiny(family)
    sf.decouple_output_embeddings(model)
    sf.freeze_norms(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert name in frozen

    def train(phase):
        opt = phase.optimizer(lr=1e-2)
        ids = torch.arange(4, 10)[None]
        for _ in range(2):
            nn.functional.cross_entropy(
                model(input_ids=ids).logits.flatten(0, 1), ids.flatten()
            ).backward()
            opt.step()
            opt.zero_grad()
        for n, t in frozen.items():
            assert_bits(dict(model.named_parameters())[n].detach(), t, n)

    ticket = sf.LotteryTicket(model, k=50)
    delta = ticket.fit(train)
    assert name not in delta.layout
    assert name not in delta.heads
    embedding = model.get_input_embeddings().weight
    assert next(n for n, p in model.named_parameters() if p is embedding) in delta.layout


def test_where_ties_follow_the_configuration_it_is_switched_off():
    """transformers 4 lists the names only, and ties by the configuration."""

    class Old(nn.Module):
        _tied_weights_keys = ("out.weight",)

        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(tie_word_embeddings=True)
            self.config.get_text_config = lambda: self.config
            self.emb, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.tie_weights()

        def get_input_embeddings(self) -> nn.Module:
            return self.emb

        def get_output_embeddings(self) -> nn.Module:
            return self.out

        def tie_weights(self) -> None:
            if self.config.tie_word_embeddings:
                self.out.weight = self.emb.weight

    model = Old()
    assert sf.decouple_output_embeddings(model) == ["out.weight"]
    model.tie_weights()
    assert model.out.weight is not model.emb.weight
    assert torch.equal(model.out.weight, model.emb.weight)


def test_an_output_matrix_may_stay_trainable():
    model = tiny("GPT-2")
    assert sf.decouple_output_embeddings(model, freeze=False) == ["lm_head.weight"]
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.lm_head.weight.requires_grad


def test_models_without_output_embeddings():
    with pytest.raises(TypeError, match="Linear has no get_output_embeddings"):
        sf.decouple_output_embeddings(nn.Linear(2, 2))
    model = tiny("BERT").bert
    assert sf.decouple_output_embeddings(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_norms_that_the_reference_implementation_misses():
    by_type, by_name = (set(sf.freeze_norms(tiny("XLM-R"), by_name=b)) for b in (False, True))
    assert by_type - by_name == {"lm_head.layer_norm.weight", "lm_head.layer_norm.bias"}
    assert by_name < by_type
    assert sf.freeze_norms(tiny("Llama"), by_name=True) == []


class Tied(nn.Module):
    """A head that comes before the backbone and is tied to it, as XLM-R's is in transformers 5."""

    base_model_prefix = "inner"

    def __init__(self, attribute: str = "inner") -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)
        setattr(self, attribute, nn.ModuleDict({"emb": nn.Embedding(5, 4), "lin": nn.Linear(4, 4)}))
        self.head.weight = getattr(self, attribute)["emb"].weight


def test_a_tied_parameter_goes_by_its_name_in_the_backbone():
    model = Tied()
    assert next(n for n, _ in model.named_parameters()) == "head.weight"
    inside = {"inner.emb.weight", "inner.lin.weight", "inner.lin.bias"}
    assert list(named_parameters(model)) == [
        *("inner.emb.weight", "head.bias", "inner.lin.weight", "inner.lin.bias")
    ]
    assert backbone_names(model) == inside
    assert aliases(model) == {"inner.emb.weight": ["head.weight"]}
    # A prefix that names no module says nothing.
    assert next(iter(named_parameters(Tied("other")))) == "head.weight"
    base, theta0 = copy.deepcopy(model), sf.snapshot(model)
    support = sf.select(model, density=1.0, criterion="random")
    assert set(support.layout.names) == inside
    optimizer = sf.MaskedAdamW(model, support, theta0)
    with torch.no_grad():
        model.inner["emb"].weight += 1.0
    for delta in (optimizer.delta(), sf.SparseDelta.between(base, model)):
        assert "inner.emb.weight" in delta.layout
        assert delta.meta["aliases"] == {"inner.emb.weight": ["head.weight"]}
    with pytest.raises(ValueError, match=r"of 'inner.emb.weight', .* give the model itself"):
        sf.MaskedAdamW(model.named_parameters(), support)


def test_the_prefix_of_the_backbone_is_put_before_or_taken_off():
    model = Tied()
    bare = model.inner
    bare.base_model_prefix = "inner"
    own, inner = known_names(model), known_names(bare)
    assert own["lin.weight"] is own["inner.lin.weight"] is inner["lin.weight"]
    assert inner["inner.lin.weight"] is inner["lin.weight"]
    # A name of the model's own comes first.
    model.lin = nn.Linear(4, 4)
    assert known_names(model)["lin.weight"] is model.lin.weight


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, compiled, lambda model: compiled(nn.DataParallel(model))]
)
def test_wrappers_are_looked_through(wrap):
    model, base = Tied(), Tied()
    base.load_state_dict(model.state_dict())
    with torch.no_grad():
        model.inner["lin"].weight += 1.0
    own, tuned = (dict(m.named_parameters(prefix="inner")) for m in (base.inner, model.inner))
    delta = sf.SparseDelta.between(own, tuned)
    bare = sf.SparseDelta.between(base.inner, model.inner)
    wrapped = wrap(base)

    def bound(sft, model):
        binding = sft.bind(model)
        return {n.rpartition("lin.")[2]: t for n, t in zip(binding.names, binding.tensors)}  # noqa: B905

    assert unwrapped(wrapped) is base
    assert backbone(wrapped) is base.inner
    inside = {id(p) for p in base.inner.parameters()}
    assert {id(p) for p in eligible_parameters(wrapped).values()} == inside
    weight = base.inner["lin"].weight
    assert bound(delta, wrapped)["weight"] is bound(bare, wrapped)["weight"] is weight
    base.inner.base_model_prefix = "inner"
    assert bound(delta, wrap(base.inner))["weight"] is weight


def test_a_head_beside_the_parts_of_the_backbone():
    class Part(nn.Module):
        base_model_prefix = "parts"

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

    class PartsForAnswers(nn.Module):
        base_model_prefix = "parts"

        def __init__(self) -> None:
            super().__init__()
            self.shared, self.first = nn.Embedding(5, 4), Part()
            self.between, self.second, self.answers = nn.Linear(4, 4), Part(), nn.Linear(4, 2)

    class Parts(PartsForAnswers):
        """A bare model, whose last layer is a projection."""

    model = PartsForAnswers()
    every = {n for n, _ in model.named_parameters()}
    assert every - backbone_names(model) == {"answers.weight", "answers.bias"}
    assert backbone_names(Parts()) == every
    assert backbone_names(nn.DataParallel(model)) == {
        f"module.{n}" for n in every if not n.startswith("answers")
    }


def test_an_output_matrix_beside_the_backbone_is_a_head():
    """T5's language models have encoder, decoder and output side by side, and mT5's is not tied."""

    class Flat(nn.Module):
        base_model_prefix = "transformer"

        def __init__(self) -> None:
            super().__init__()
            self.shared, self.lm_head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    model = Flat()
    assert backbone(model) is model
    assert backbone_names(model) == {"shared.weight"}
    model.lm_head.weight = model.shared.weight
    assert backbone_names(model) == {"shared.weight"}
    assert aliases(model) == {"shared.weight": ["lm_head.weight"]}
