"""The parameter lists of real models, without their values."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def xlm_roberta(hidden: int, layers: int, feed_forward: int) -> Shapes:
    """XLM-RoBERTa with pooler: 250,002 pieces, 514 positions (Conneau et al., 2020)."""
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (250002, hidden),
        "embeddings.position_embeddings.weight": (514, hidden),
        "embeddings.token_type_embeddings.weight": (1, hidden),
        **_norm("embeddings.LayerNorm", hidden),
        **_linear("pooler.dense", hidden, hidden),
    }
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{layer}.attention.{part}", hidden, hidden)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", hidden, feed_forward)
        shapes |= _linear(f"{layer}.output.dense", feed_forward, hidden)
        shapes |= _norm(f"{layer}.output.LayerNorm", hidden)
    return shapes


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


MODELS: dict[str, Shapes] = {
    "xlmr-base": xlm_roberta(768, 12, 3072),
    "xlmr-xl": xlm_roberta(2560, 36, 10240),
    "1B": {f"layer{i:02d}": (8192, 8192) for i in range(16)},
    "xlmr-base/8": {"matrix": (34_780_000,)},
    "100M": {"matrix": (100_000_000,)},
    "25M": {"matrix": (25_000_000,)},
}
