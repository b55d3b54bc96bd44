"""Swapping on a device: the bits of the CPU, tiers within their budgets, and graphs that see it."""

import copy

import pytest
import torch
from composed import Model, made, pristine, values

import sparse_ft as sf
from sparse_ft.registry import DeltaRegistry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_set_has_the_bits_of_the_cpu(cuda, dtype, tmp_path):
    start = Model(dtype)
    model = copy.deepcopy(start).to(cuda)
    before = values(model)
    deltas = [made(start, seed) for seed in range(3)]
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for delta, path in zip(deltas, paths, strict=True):
        delta.save(path)
    one = DeltaRegistry(model)
    one.activate(one.add(paths[0]))
    room = int(one._device.nbytes * 1.5)
    one.deactivate()
    registry = DeltaRegistry(model, budget_bytes=room, host_budget_bytes=0)
    a, b, c = (registry.add(path, path.stem) for path in paths)
    for chosen, heads, alphas in ([a], a, [1.0]), ([b, c], c, [0.5, -2.0]), ([c, a], a, [1.0, 1.0]):
        for done in registry.prefetch(chosen):
            done.result(30)
        registry.activate(list(zip(chosen, alphas, strict=True)), heads)
        with sf.compose(start, [deltas[int(i)] for i in chosen], alphas, heads=deltas[int(heads)]):
            expected = values(start)
        holds(model, expected)
    registry.deactivate()
    assert registry._device.nbytes <= room
    pristine(model, before)


def holds(model, expected):
    pristine(copy.deepcopy(model).cpu(), expected)


def test_a_graph_sees_the_swap(cuda):
    start = Model()
    model = copy.deepcopy(start).to(cuda)
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(start, seed), name)
    x = torch.arange(10, device=cuda).reshape(2, 5)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for chosen in ("a", ["a", ("b", 0.5)], "b", []):
            registry.activate(chosen)
            graph.replay()
            assert torch.equal(out, model(x))


def test_a_swap_waits_for_nothing(cuda):
    start = Model()
    model = copy.deepcopy(start).to(cuda)
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(start, seed), name)
        registry.activate(name)
    registry.activate("a")
    registry.activate("b")
    torch.cuda.set_sync_debug_mode("error")
    try:
        registry.activate("a")
        registry.deactivate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_heads_are_on_the_device_and_count(cuda):
    start = Model()
    model = copy.deepcopy(start).to(cuda)
    before = values(model)
    registry = DeltaRegistry(model)
    delta = made(start, 0)
    registry.add(delta, "a")
    host = registry._host.get(delta.content_id)
    registry.activate("a")
    near = registry._device.get(delta.content_id)
    assert near.heads.keys() == delta.heads.keys()
    assert all(value.is_pinned() for value in host.heads.values())
    assert all(value.is_cuda for value in near.heads.values())
    assert near.nbytes == host.nbytes == registry._device.nbytes
    # Taken off on another stream, evicted, and its memory asked for at once.
    registry._device.budget = 0
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        registry.activate("a", "a")
        registry.deactivate()
    del near
    torch.full((1 << 20,), torch.nan, device=cuda)
    torch.cuda.current_stream().wait_stream(side)
    pristine(model, before)


def test_what_is_on_the_cpu_counts_once(cuda):
    start = Model()
    model = copy.deepcopy(start).to(cuda)
    model.lin.cpu()
    before = values(model)
    registry = DeltaRegistry(model)
    registry.add(delta := made(start, 0), "a", allow_base_mismatch=True)
    registry.activate("a")
    near = registry._device.get(delta.content_id)
    parts = {kind[0].type: part for kind, part in near.parts.items()}
    assert {array.device.type for array in parts["cpu"]} == {"cpu"}
    on_device = [*parts["cuda"], *near.heads.values()]
    assert registry._device.nbytes == sum(a.numel() * a.element_size() for a in on_device)
    registry.deactivate()
    pristine(model, before)
