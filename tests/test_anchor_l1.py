"""anchor_l1_: the gradient and the value of the L1 term."""

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, MODELS, numels, rng, tensors

from sparse_ft_kernels import anchor_l1_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_against_numpy(backend, name, dtype):
    generator = rng(name, dtype)
    weights, anchors, grads = (tensors(MODELS[name], generator, dtype) for _ in range(3))
    for w, a in zip(weights, anchors, strict=True):
        w.view(-1)[::3] = a.view(-1)[::3]
    before = [g.clone() for g in grads]
    total = anchor_l1_(grads, weights, anchors, 0.25)
    tile_sums = []
    for g, b, w, a in zip(grads, before, weights, anchors, strict=True):
        moved = w.float().numpy() - a.float().numpy()
        distance = np.abs(moved).astype(np.float64).reshape(-1)
        for at in range(0, len(distance), oracles.TILE):
            tile_sums.append(sum(oracles.run_sums(distance[at : at + oracles.TILE])))
        want = b.float().numpy() + np.float32(0.25) * np.sign(moved)
        oracles.assert_bits(g, torch.from_numpy(np.asarray(want)).to(dtype))
    assert float(total) == oracles.tree_sum(np.asarray(tile_sums))
    assert float(total) == pytest.approx(sum(tile_sums), rel=1e-12)


def test_is_the_gradient_of_its_value(backend):
    generator = rng("autograd")
    weight = torch.randn(1000, generator=generator, requires_grad=True)
    anchor = torch.randn(1000, generator=generator)
    (0.1 * (weight - anchor).abs().sum()).backward()
    grad = torch.zeros(1000)
    value = anchor_l1_([grad], [weight.detach()], [anchor], 0.1)
    assert torch.equal(grad, weight.grad)
    assert float(value) == pytest.approx(float((weight - anchor).abs().sum()), rel=1e-6)


def test_missing_gradients(backend):
    generator = rng("missing")
    weights, anchors = (tensors([(10,), (70_000,)], generator) for _ in range(2))
    grad = torch.zeros(70_000)
    total = anchor_l1_([torch.empty(0), grad], weights, anchors, 1.0)
    assert grad.abs().sum() == 70_000
    only_value = anchor_l1_([], weights, anchors, 1.0)
    assert float(only_value) == float(total)
    assert sum(numels(weights)) == 70_010
