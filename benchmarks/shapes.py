"""The parameter lists of real models, without their values, and plain ones of a round size.

The names and shapes are those of Transformers' modules (tests compare them).
"""

from __future__ import annotations

import math

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def xlm_roberta(hidden: int, layers: int, feed_forward: int, large: bool = False) -> Shapes:
    """XLM-RoBERTa with pooler (Conneau et al., 2020).

    Args:
        hidden: Width.
        layers: Layers of the encoder.
        feed_forward: Width of the feed-forward part.
        large: The variant of XL and XXL (Goyal et al., 2021): norms come before each part, and the
            vocabulary has 250,880 pieces instead of 250,002.
    """
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (250880 if large else 250002, hidden),
        "embeddings.position_embeddings.weight": (514, hidden),
        "embeddings.token_type_embeddings.weight": (1, hidden),
        **_norm("encoder.LayerNorm" if large else "embeddings.LayerNorm", hidden),
        **_linear("pooler.dense", hidden, hidden),
    }
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{layer}.attention.{part}", hidden, hidden)
        norm = "attention.self_attn_layer_norm" if large else "attention.output.LayerNorm"
        shapes |= _norm(f"{layer}.{norm}", hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", hidden, feed_forward)
        shapes |= _linear(f"{layer}.output.dense", feed_forward, hidden)
        shapes |= _norm(f"{layer}.{'LayerNorm' if large else 'output.LayerNorm'}", hidden)
    return shapes


def llama(vocabulary: int, hidden: int, layers: int, feed_forward: int, key_value: int) -> Shapes:
    """A Llama decoder with its own output embeddings (Dubey et al., 2024).

    Args:
        vocabulary: Pieces.
        hidden: Width.
        layers: Layers.
        feed_forward: Width of the gated feed-forward part.
        key_value: Width of keys and values, which groups of heads share.
    """
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part, outputs in (("q", hidden), ("k", key_value), ("v", key_value), ("o", hidden)):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (outputs, hidden)
        for part in ("gate", "up"):
            shapes[f"{layer}.mlp.{part}_proj.weight"] = (feed_forward, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, feed_forward)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


MODELS: dict[str, Shapes] = {
    "xlmr-base": xlm_roberta(768, 12, 3072),
    "xlmr-large": xlm_roberta(1024, 24, 4096),
    "xlmr-xl": xlm_roberta(2560, 36, 10240, large=True),
    "xlmr-xxl": xlm_roberta(4096, 48, 16384, large=True),
    "llama-8b": llama(128256, 4096, 32, 14336, 1024),
    "1B": {f"layer{i:02d}": (8192, 8192) for i in range(16)},
    "100M": {"matrix": (100_000_000,)},
    "25M": {"matrix": (25_000_000,)},
    "5M": {
        "embeddings": (20_000, 128),
        **{f"layer{i}": (512, 512) for i in range(9)},
        "bias": (512,),
    },
}


def shapes_of(name: str) -> Shapes:
    """The parameters of a model of MODELS, or of N equal matrices for a name as "N=1000000"."""
    if name.startswith("N="):
        rows = math.isqrt(int(name[2:]))
        return {"matrix": (rows, rows), "rest": (int(name[2:]) - rows * rows,)}
    return MODELS[name]


def numel(name: str) -> int:
    """The number of parameters of a model."""
    return sum(math.prod(shape) for shape in shapes_of(name).values())
