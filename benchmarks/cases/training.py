"""A whole training step of the second phase: forward, backward and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import sparse_ft as sf

from ..case import Case, Job, Provider, Setting, Target, case

# The published recipes take 8 sequences; the large model gets 2 on a CPU, where a step would take
# half a minute.
SEQUENCE = 128
SIZES = {
    "5M": (128, 4, 512, 8, 20_000),
    "xlmr-base": (768, 12, 3072, 8, 250_002),
    "xlmr-large": (1024, 24, 4096, 8, 250_002),
}
LR = 1e-5
LABELS = 17  # the part-of-speech tags of Universal Dependencies


def _model(setting: Setting) -> tuple[nn.Module, dict[str, Tensor]]:
    """XLM-R with a token classifier and random weights, and a batch of random pieces."""
    import transformers

    if setting.shape not in SIZES:
        raise ValueError(
            f"training_step: no model for {setting.shape!r}; known: {', '.join(SIZES)}"
        )
    hidden, layers, feed_forward, batch, vocabulary = SIZES[setting.shape]
    if setting.device == "cpu" and setting.shape == "xlmr-large":
        batch = 2
    config: Any = transformers.XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=feed_forward,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = LABELS
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = transformers.XLMRobertaForTokenClassification(config)
        pieces = torch.randint(5, vocabulary, (batch, SEQUENCE))
        labels = torch.randint(0, LABELS, (batch, SEQUENCE))
    nn.Module.to(model, setting.torch_dtype).train()
    return model, {"input_ids": pieces, "labels": labels}


def read_grad(parameter: nn.Parameter) -> Tensor:
    """The gradient that a backward pass has left."""
    assert parameter.grad is not None
    return parameter.grad


@case(
    "masked_adamw_",
    "gather",
    shapes=tuple(SIZES),
    input_bytes=lambda s: s.numel * (3 * s.width + 4) + 40 * s.nnz + 4e9,
)
def training_step(setting: Setting) -> Case:
    """A whole step of the second phase: forward, backward, clipping and optimizer."""
    model, batch = _model(setting)
    backbone = {n: p for n, p in model.named_parameters() if not n.startswith("classifier")}
    names = sorted(backbone)
    weights = [backbone[n].detach() for n in names]
    parameters = list(model.parameters())
    everything = [p.detach().clone() for p in parameters]
    by_name = {n: s for (n, _), s in zip(model.named_parameters(), everything, strict=True)}
    start = [by_name[n] for n in names]
    k = max(1, int(setting.density * sum(w.numel() for w in weights)))
    on_gpu = setting.device == "cuda"

    @cache
    def support() -> sf.Support:
        if setting.support == "uniform":
            chosen = sf.select(model, k=k, criterion="random", eligible=names)
        else:
            generator = torch.Generator(setting.device).manual_seed(0)
            moved = {
                n: w + torch.randn(w.shape, generator=generator, device=w.device) * w.float().std()
                for n, w in zip(names, weights, strict=True)
            }
            chosen = sf.select(moved, dict(zip(names, weights, strict=True)), k=k)
        return chosen

    @cache
    def masks() -> dict[nn.Parameter, Tensor]:
        return {backbone[n]: support().mask(n).to(setting.device) for n in names}

    def compute() -> None:
        for p in parameters:
            p.grad = None
        model(**batch).loss.backward()

    def ours() -> sf.MaskedAdamW:
        return sf.MaskedAdamW(
            model.named_parameters(), support().to(setting.device), lr=LR, max_grad_norm=1.0
        )

    def our_step() -> Job:
        optimizer = ours()

        def run() -> None:
            compute()
            optimizer.step()

        return run

    def our_share() -> Job:
        """The optimizer alone, on gradients that are there."""
        optimizer = ours()
        compute()
        return lambda: optimizer.step()

    def dense_step(fused: bool = False) -> Callable[[], Job]:
        def build() -> Job:
            optimizer = torch.optim.AdamW(
                parameters, lr=LR, weight_decay=0.0, fused=fused or None, capturable=on_gpu
            )
            masks()

            def run() -> None:
                compute()
                for p, mask in masks().items():
                    read_grad(p).mul_(mask)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()

            return run

        return build

    def check(_: Any) -> None:
        """What is selected has moved, and nothing else."""
        moved = [w != s for w, s in zip(weights, start, strict=True)]
        everywhere = sum(int(m.count_nonzero()) for m in moved)
        selected = sum(int(c.count_nonzero()) for c in taken(moved))
        assert everywhere == selected > 0, f"{everywhere - selected} frozen weights moved"

    def taken(tensors: list[Tensor]) -> list[Tensor]:
        """The selected entries of tensors in the order of names."""
        return [
            t.view(-1)[support().indices(n).to(t.device)]
            for n, t in zip(names, tensors, strict=True)
        ]

    def reset() -> None:
        with torch.no_grad():
            for p, s in zip(parameters, everything, strict=True):
                p.copy_(s)

    def verify() -> None:
        """The first step of Adam is LR · g / (|g| + ε): its moments are g and g²."""
        optimizer = ours()
        compute()
        gradients = [g.float() for g in taken([read_grad(backbone[n]) for n in names])]
        rest = [read_grad(p).float() for n, p in model.named_parameters() if n not in backbone]
        norm = torch.stack([g.double().norm() for g in (*gradients, *rest)]).norm()
        factor = float(1 / (norm + 1e-6).clamp(min=1))
        optimizer.step()
        ulp = torch.finfo(setting.torch_dtype).eps
        for found, s, g in zip(taken(weights), taken(start), gradients, strict=True):
            step = LR * factor * g / (factor * g.abs() + 1e-8)
            expected = (s.float() - step).to(s.dtype)
            torch.testing.assert_close(found, expected, rtol=ulp, atol=1e-4 * LR)
        reset()

    n = sum(p.numel() for p in parameters)
    moments, width = 2 * setting.width * n, setting.width
    reference = "composable-sft (Ansell et al., 2022): gradient times mask, clip, dense AdamW"
    share = "sparse_ft, optimizer alone"
    providers = {
        "sparse_ft": Provider(our_step, check=check, state_bytes=(3 * 4 + 2 + width) * k),
        share: Provider(
            our_share, "the part of it that is the optimizer step with clipping", whole=False
        ),
        "forward and backward alone": Provider(
            lambda: compute, "no optimizer at all: what no step can beat", whole=False
        ),
        "gradient × mask, fused AdamW": Provider(
            dense_step(fused=True), reference, check, moments + n, moments + n
        ),
        "gradient × mask, default AdamW": Provider(
            dense_step(), reference, check, moments + 3 * n, moments + n
        ),
    }
    tokens = batch["input_ids"].numel()
    return Case(
        "training_step",
        setting,
        # The weights twice and their gradients, but what takes the time is arithmetic.
        4 * width * n,
        providers,
        verify,
        reset,
        targets=(Target("share", 0.05, share), Target("peer", 1.0, "gradient × mask, fused AdamW")),
        has_floor=False,
        note=f"{tokens // SEQUENCE} sequences of {SEQUENCE} pieces, {n / 1e6:.0f}M parameters",
    )
