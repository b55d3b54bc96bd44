"""digest: the stated formula in Python integers, and what it must and must not notice."""

import pytest
import torch
from oracles import DTYPES, MODELS, numels, random_support, rng, tensors

from sparse_ft_kernels import digest

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    z &= MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["empty", "no-elements", "one", "65537", "many"])
def test_formula(backend, name, dtype):
    generator = rng(name, dtype)
    model = tensors(MODELS[name], generator, dtype)
    idx, ptr, chosen = random_support(numels(model), 0.01, generator)
    full = half = tile = 0
    for t, flat in zip(model, chosen, strict=True):
        values = t.reshape(-1).float()
        bits32 = values.view(torch.int32).tolist() if t.numel() else []
        bits16 = values.to(torch.bfloat16).view(torch.int16).tolist() if t.numel() else []
        for i in flat.tolist():
            position = ((tile * 65536 + i + 1) * 0x9E3779B97F4A7C15) & MASK
            full += mix(position + (bits32[i] & 0xFFFFFFFF) * 0xD1342543DE82EF95)
            half += mix(position + (bits16[i] & 0xFFFF) * 0xD1342543DE82EF95)
        tile += -(-t.numel() // 65536)
    assert [x & MASK for x in digest(model, idx, ptr).tolist()] == [full & MASK, half & MASK]


def test_notices_one_bit_and_ignores_the_unselected(backend):
    generator = rng("bit")
    model = tensors([(70_000,), (9,)], generator)
    idx, ptr, chosen = random_support([70_000, 9], 0.1, generator)
    before = digest(model, idx, ptr)
    unselected = next(i for i in range(70_000) if i not in set(chosen[0].tolist()))
    model[0][unselected] = 17.0
    assert torch.equal(digest(model, idx, ptr), before)
    at = int(chosen[0][5])
    model[0].view(torch.int32)[at] ^= 1
    after = digest(model, idx, ptr)
    assert after[0] != before[0]
    model[0].view(torch.int32)[at] ^= 1
    assert torch.equal(digest(model, idx, ptr), before)


def test_bf16_model_and_its_fp32_original_share_a_digest(backend):
    generator = rng("cast")
    model = tensors([(70_000,)], generator)
    idx, ptr, _ = random_support([70_000], 0.1, generator)
    full, half = digest(model, idx, ptr), digest([t.to(torch.bfloat16) for t in model], idx, ptr)
    assert full[1] == half[1]
    assert full[0] != half[0]
