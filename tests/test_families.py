"""families: norms, tied output embeddings and backbones of models as they come."""

from types import SimpleNamespace

import pytest
import torch
from oracles import assert_bits
from torch import Tensor, nn

import sparse_ft as sf
from sparse_ft.families import aliases, backbone, backbone_names, is_norm, named_parameters


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


# --- models of transformers, tiny and with random weights -----------------------------------------

SIZES = {"vocab_size": 37, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    kind, config = {
        "xlm-r": (
            "XLMRobertaForMaskedLM",
            transformers.XLMRobertaConfig(**SIZES, intermediate_size=16),
        ),
        "bert": ("BertForMaskedLM", transformers.BertConfig(**SIZES, intermediate_size=16)),
        "gpt2": (
            "GPT2LMHeadModel",
            transformers.GPT2Config(
                vocab_size=37, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
            ),
        ),
        "llama": (
            "LlamaForCausalLM",
            transformers.LlamaConfig(**SIZES, intermediate_size=16, tie_word_embeddings=True),
        ),
        "untied": (
            "LlamaForCausalLM",
            transformers.LlamaConfig(**SIZES, intermediate_size=16, tie_word_embeddings=False),
        ),
        "t5": (
            "T5ForConditionalGeneration",
            transformers.T5Config(
                vocab_size=37, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
            ),
        ),
        "bart": (
            "BartForConditionalGeneration",
            transformers.BartConfig(
                vocab_size=37,
                d_model=8,
                max_position_embeddings=20,
                **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
                **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
                **{f"{side}_ffn_dim": 8 for side in ("encoder", "decoder")},
            ),
        ),
    }[name]
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # so that a lost bias shows
            p.add_(torch.randn(p.shape) * 0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(4, 10)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


OUTPUT = {
    "xlm-r": "lm_head.decoder.weight",
    "bert": "cls.predictions.decoder.weight",
    **dict.fromkeys(("gpt2", "llama", "untied", "t5", "bart"), "lm_head.weight"),
}


def groups(model: nn.Module) -> set[frozenset[str]]:
    """The names of tied parameters, together."""
    return {frozenset([own, *names]) for own, names in aliases(model).items()}


@pytest.mark.parametrize("name", OUTPUT)
@pytest.mark.parametrize("moved", [False, True])
def test_output_embeddings_are_decoupled_for_good(name, moved, tmp_path):
    model = tiny(name)
    before = logits(model)
    ties = groups(model)
    assert sf.decouple_output_embeddings(model) == [OUTPUT[name]]
    assert torch.equal(logits(model), before)
    output, embedding = (
        model.get_output_embeddings().weight,
        model.get_input_embeddings().weight,
    )
    assert output is not embedding
    assert output.data_ptr() != embedding.data_ptr()
    assert (output.requires_grad, embedding.requires_grad) == (False, True)
    # Everything else that was tied still is.
    rest = {group - {OUTPUT[name]} for group in ties}
    assert groups(model) == {group for group in rest if len(group) > 1}
    frozen = output.detach().clone()
    if moved:
        with torch.no_grad():
            embedding += 1.0
            for n, p in model.named_parameters():
                if n.endswith("bias"):
                    p += 0.25
    model.tie_weights()
    assert model.get_output_embeddings().weight is output
    assert_bits(output.detach(), frozen)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert_bits(loaded.get_output_embeddings().weight.detach(), frozen)
    for n, p in model.named_parameters(remove_duplicate=False):
        found = dict(loaded.named_parameters(remove_duplicate=False))[n]
        assert_bits(found.detach(), p.detach(), n)
    # And once more, on the loaded model.
    assert sf.decouple_output_embeddings(loaded) == [OUTPUT[name]]
    loaded.tie_weights()
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    assert not loaded.get_output_embeddings().weight.requires_grad
    # A second call changes nothing.
    assert sf.decouple_output_embeddings(model) == [OUTPUT[name]]
    assert model.get_output_embeddings().weight is output


@pytest.mark.parametrize("name", ["xlm-r", "bart"])
def test_training_leaves_the_output_matrix_alone(name):
    model = tiny(name)
    sf.decouple_output_embeddings(model)
    sf.freeze_norms(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert OUTPUT[name] in frozen

    def train(phase):
        opt = phase.optimizer(lr=1e-2)
        ids = torch.arange(4, 10)[None]
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        for _ in range(2):
            nn.functional.cross_entropy(
                model(input_ids=ids, **more).logits.flatten(0, 1), ids.flatten()
            ).backward()
            opt.step()
            opt.zero_grad()
        for n, t in frozen.items():
            assert_bits(dict(model.named_parameters())[n].detach(), t, n)

    ticket = sf.LotteryTicket(model, k=50)
    delta = ticket.fit(train)
    assert OUTPUT[name] not in delta.layout
    assert OUTPUT[name] not in delta.heads
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
    model = tiny("gpt2")
    assert sf.decouple_output_embeddings(model, freeze=False) == ["lm_head.weight"]
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.lm_head.weight.requires_grad


def test_models_without_output_embeddings():
    with pytest.raises(TypeError, match="Linear has no get_output_embeddings"):
        sf.decouple_output_embeddings(nn.Linear(2, 2))
    model = tiny("bert").bert
    assert sf.decouple_output_embeddings(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_backbones_and_norms_of_transformers():
    for name, prefix in [
        *(("xlm-r", "roberta."), ("bert", "bert."), ("gpt2", "transformer.")),
        *(("llama", "model."), ("bart", "model.")),
    ]:
        model = tiny(name)
        names = {n for n, _ in model.named_parameters()}
        tied = {own for own, further in aliases(model).items() if own == OUTPUT[name]}
        assert backbone_names(model) == {n for n in names if n.startswith(prefix)} | tied, name
        inside = backbone_names(model)
        embedding = model.get_input_embeddings().weight
        assert any(p is embedding for n, p in model.named_parameters() if n in inside)
    # The substring that the reference implementation looks for misses these.
    assert set(sf.freeze_norms(tiny("xlm-r"))) - set(
        sf.freeze_norms(tiny("xlm-r"), by_name=True)
    ) == {
        "lm_head.layer_norm.weight",
        "lm_head.layer_norm.bias",
    }
    llama = sf.freeze_norms(tiny("llama"))
    assert llama
    assert sf.freeze_norms(tiny("llama"), by_name=True) == []
    assert all("norm" in n for n in llama)
    assert all("ln_" in n for n in sf.freeze_norms(tiny("gpt2")))
    assert all("layer_norm" in n for n in sf.freeze_norms(tiny("t5")))
