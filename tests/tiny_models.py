"""Tiny models of transformers with random weights, one per family, for the tests of structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 37
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1}
_HEADS = {
    **_SIZES,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "max_position_embeddings": 20,
    "decoder_start_token_id": 2,
    **_TOKENS,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 8 for side in ("encoder", "decoder")},
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        kind: The first part of its classes' names.
        config: Sizes of a tiny model.
        language: The class with the language-model head.
        tasks: The classes with a task head, without `kind`.
    """

    kind: str
    config: dict[str, Any]
    language: str
    tasks: tuple[str, ...]


_BOTH = ("ForSequenceClassification", "ForTokenClassification")
_ALL = (*_BOTH, "ForQuestionAnswering")
FAMILIES = {
    "BERT": Family("Bert", _HEADS, "ForMaskedLM", _ALL),
    "XLM-R": Family(
        "XLMRoberta",
        {**_HEADS, "max_position_embeddings": 20, "type_vocab_size": 1, **_TOKENS},
        "ForMaskedLM",
        _ALL,
    ),
    "DistilBERT": Family(
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
        "ForMaskedLM",
        _ALL,
    ),
    "ModernBERT": Family(
        "ModernBert",
        {
            **_HEADS,
            **_TOKENS,
            "cls_token_id": 0,
            "sep_token_id": 2,
            "reference_compile": False,
        },
        "ForMaskedLM",
        _ALL,
    ),
    "T5": Family("T5", _T5, "ForConditionalGeneration", _ALL),
    "mT5": Family("MT5", {**_T5, "tie_word_embeddings": False}, "ForConditionalGeneration", _ALL),
    "NLLB": Family("M2M100", _BART, "ForConditionalGeneration", ()),
    "BART": Family(
        "Bart",
        _BART,
        "ForConditionalGeneration",
        ("ForSequenceClassification", "ForQuestionAnswering"),
    ),
    "GPT-2": Family(
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2, **_TOKENS},
        "LMHeadModel",
        _ALL,
    ),
    "Llama": Family("Llama", {**_HEADS, **_TOKENS}, "ForCausalLM", _ALL),
    "Llama, tied": Family(
        "Llama", {**_HEADS, **_TOKENS, "tie_word_embeddings": True}, "ForCausalLM", _ALL
    ),
    "Qwen": Family(
        "Qwen2", {**_HEADS, **_TOKENS, "tie_word_embeddings": True}, "ForCausalLM", _ALL
    ),
    "Qwen 3": Family(
        "Qwen3",
        {**_HEADS, **_TOKENS, "head_dim": 4, "tie_word_embeddings": True},
        "ForCausalLM",
        _ALL,
    ),
    "Gemma": Family("Gemma", {**_HEADS, **_TOKENS, "head_dim": 4}, "ForCausalLM", _BOTH),
    "Gemma 3": Family(
        "Gemma3Text",
        {**_HEADS, **_TOKENS, "head_dim": 4},
        "Gemma3ForCausalLM",
        ("ForSequenceClassification",),
    ),
}


def find_class(kind: str, head: str) -> Any:
    """The class of transformers for a family and a head, such as Bert and ForMaskedLM; "Model" is
    the bare one."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return getattr(transformers, kind + head, None) or getattr(transformers, head)


def tiny(family: str, head: str | None = None, **config: Any) -> nn.Module:
    """A model of a family, with its language-model head by default, in evaluation mode.

    Weights come from a fixed seed, norms and biases too, so that a lost one shows.
    """
    its = FAMILIES[family]
    made = find_class(its.kind, "Config")(**{**its.config, **config})
    torch.manual_seed(0)
    model: nn.Module = find_class(its.kind, head or its.language)(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    """Two short sentences, and what a decoder is given."""
    ids = torch.tensor([[5, 9, 14, 7, 30, 2], [6, 11, 8, 21, 33, 2]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and "ForTokenClassification" not in type(model).__name__:
        given["decoder_input_ids"] = ids
    return given


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(**inputs(model)).logits
    return out
