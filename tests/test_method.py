"""The method itself: LT-SFT as the paper has it, beside a dense version in plain PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from oracles import assert_bits
from torch import Tensor, nn

import sparse_ft as sf

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, BATCH = 101, 12, 4
FULL, SPARSE = 25, 30
LR, L1, CLIP = 2e-3, 0.1, 1.0


def bert(head: str = "BertForMaskedLM", **config: Any) -> nn.Module:
    """A small BERT in fp32, without dropout; norms frozen, output matrix decoupled and frozen."""
    torch.manual_seed(0)
    made = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **config,
    )
    model: nn.Module = getattr(transformers, head)(made).train()
    if head == "BertForMaskedLM":
        sf.decouple_output_embeddings(model)
    sf.freeze_norms(model)
    return model


@functools.cache
def masked_text() -> list[dict[str, Tensor]]:
    """Batches for masked language modelling. Half of the vocabulary never occurs."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(7):
        ids = torch.randint(0, VOCABULARY // 2, (BATCH, LENGTH), generator=generator)
        hidden = torch.rand(ids.shape, generator=generator) < 0.2
        labels = ids.masked_fill(~hidden, -100)
        batches.append({"input_ids": ids.masked_fill(hidden, 3), "labels": labels})
    return batches


@functools.cache
def tagged_text() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shape = (5, BATCH, LENGTH)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    return [{"input_ids": x, "labels": x % 2} for x in ids]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def linear(steps: int):
    return lambda step: (steps - step) / steps


# --- the dense procedure ------------------------------------------------------------------------


def dense_phase(
    model: nn.Module, masks: dict[str, Tensor] | None, steps: int, accumulate: int
) -> None:
    """A phase as the paper describes it: mask the gradient, add that of λ/N·Σ|θ − θ0|, clip the
    norm, take a step of AdamW."""
    start, tuned = values_of(model), trainable(model)
    numel = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(tuned.values(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear(steps))
    batches = masked_text()
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(step * accumulate, (step + 1) * accumulate):
            (model(**batches[micro % len(batches)]).loss / accumulate).backward()
        for name, parameter in tuned.items():
            if masks is not None and name in masks:
                parameter.grad *= masks[name]
            parameter.grad += L1 / numel * torch.sign(parameter.detach() - start[name])
        nn.utils.clip_grad_norm_(tuned.values(), CLIP)
        optimizer.step()
        schedule.step()


@functools.cache
def dense(accumulate: int) -> tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """K, the masks, φ at all entries and the heads.

    K is where the sorted differences have the widest gap, so that no rounding can move an entry
    across it.
    """
    model = bert()
    start = values_of(model)
    dense_phase(model, None, FULL, accumulate)
    names = sorted(n for n in trainable(model) if n.startswith("bert."))
    tuned = values_of(model)
    moved = torch.cat([(tuned[n] - start[n]).abs().flatten() for n in names])
    ordered = moved.sort(descending=True).values
    window = ordered[1500:1601]
    k = 1501 + int((window[:-1] - window[1:]).argmax())
    chosen = torch.zeros(len(moved), dtype=torch.bool)
    chosen[torch.topk(moved, k).indices] = True
    pieces = chosen.split([start[n].numel() for n in names])
    masks = {n: piece.view(start[n].shape) for n, piece in zip(names, pieces, strict=True)}
    model.load_state_dict(start, strict=False)
    dense_phase(model, masks, SPARSE, accumulate)
    tuned = values_of(model)
    phi = {n: tuned[n] - start[n] for n in names}
    heads = {n: tuned[n] for n in trainable(model) if n not in masks}
    return k, masks, phi, heads


def plain_loop(accumulate: int):
    """The same loop for both phases, in plain PyTorch, with the phase's optimizer."""

    def train(phase) -> None:
        batches, steps = masked_text(), FULL if phase.name == "full" else SPARSE
        optimizer = phase.optimizer(lr=LR, max_grad_norm=CLIP)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear(steps))
        for step in range(steps):
            for micro in range(step * accumulate, (step + 1) * accumulate):
                (phase.model(**batches[micro % len(batches)]).loss / accumulate).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return train


def ready_loop(accumulate: int, **more: Any):
    from sparse_ft.loop import Loop

    batches = masked_text()
    return Loop(batches, FULL, SPARSE, lr=LR, accumulate=accumulate, max_grad_norm=CLIP, **more)


TRAINERS = {
    "plain": plain_loop,
    "Loop": ready_loop,
    "Loop, hook": functools.partial(ready_loop, gather="hook"),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_both_phases_follow_the_dense_procedure(trainer, accumulate):
    k, masks, phi, heads = dense(accumulate)
    model = bert()
    start = values_of(model)
    delta = sf.LotteryTicket(model, k=k, l1=L1).fit(TRAINERS[trainer](accumulate), progress=False)
    # The same mask.
    assert delta.nnz == k
    assert set(delta.layout.names) == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(delta.indices(name), mask.flatten().nonzero().flatten()), name
    # φ and heads to 1e-6, where they are far larger.
    assert max(float(d.abs().max()) for d in phi.values()) > 1e-2
    for name, difference in phi.items():
        assert (delta.dense(name) - difference).abs().max() <= 1e-6, name
    assert delta.heads.keys() == heads.keys() != set()
    for name, head in heads.items():
        assert (delta.heads[name] - head).abs().max() <= 1e-6, name
        assert (head - start[name]).abs().max() > 1e-3
    # The model is given back as it was.
    for name, value in values_of(model).items():
        assert_bits(value, start[name], name)


# --- what is not selected -----------------------------------------------------------------------


@pytest.mark.parametrize("gather", ["step", "hook"])
def test_what_is_not_selected_keeps_its_bits(gather):
    model = bert()
    start = values_of(model)
    seen = []

    def train(phase) -> None:
        optimizer = phase.optimizer(
            lr=1e-2, weight_decay=0.3, max_grad_norm=0.1, betas=(0.95, 0.99), gather=gather
        )
        for micro, batch in enumerate(masked_text() * 4):
            (phase.model(**batch).loss / 2).backward()
            if micro % 2:
                optimizer.step()
                optimizer.zero_grad()
        now = values_of(phase.model)
        for name, value in now.items():
            selected = torch.zeros(value.numel(), dtype=torch.bool)
            if phase.support is not None and name in phase.support.layout:
                selected[phase.support.indices(name)] = True
            else:
                selected |= name in trainable(model)
            kept = ~selected
            assert_bits(value.flatten()[kept], start[name].flatten()[kept], name)
        changed = sum(int((now[n] != start[n]).sum()) for n in trainable(model))
        seen.append((phase.name, changed))

    delta = sf.LotteryTicket(model, density=0.05, l1=L1).fit(train, progress=False)
    heads = sum(head.numel() for head in delta.heads.values())
    (full, everything), (sparse, few) = seen
    assert (full, sparse) == ("full", "sparse")
    assert everything > 0.8 * sum(p.numel() for p in trainable(model).values())
    assert 0.9 * (delta.nnz + heads) < few <= delta.nnz + heads


# --- a task on a source language ----------------------------------------------------------------


def language(model: nn.Module, seed: int) -> sf.SparseDelta:
    """A language SFT of a tenth of every tensor of the backbone."""
    generator = torch.Generator().manual_seed(seed)
    base = {n: p for n, p in values_of(model).items() if n.startswith("bert.")}
    tuned = {
        n: v
        + torch.randn(v.shape, generator=generator)
        * (torch.rand(v.shape, generator=generator) < 0.1)
        for n, v in base.items()
    }
    return sf.SparseDelta.between(base, tuned, role="language")


def test_the_sft_of_a_task_has_nothing_of_the_source_language():
    model = bert("BertForTokenClassification")
    bare = values_of(model)
    source, target = language(model, 1), language(model, 2)
    began, ended = {}, {}

    def train(phase) -> None:
        began[phase.name] = values_of(phase.model)
        optimizer = phase.optimizer(lr=5e-3, max_grad_norm=CLIP)
        for batch in tagged_text() * 3:
            phase.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ended[phase.name] = values_of(phase.model)

    with sf.compose(model, [source]):
        shifted = values_of(model)
        delta = sf.LotteryTicket(model, density=0.03).fit(train, progress=False, role="task")
        for name, value in values_of(model).items():
            assert_bits(value, shifted[name], name)
    for name, value in values_of(model).items():
        assert_bits(value, bare[name], name)
    for name, value in shifted.items():
        # Both phases begin at θ0 + φ_source.
        assert_bits(began["full"][name], value, name)
        assert_bits(began["sparse"][name], value, name)
    only_source = 0
    for name in delta.layout.names:
        phi, begin, end = delta.dense(name), shifted[name], ended["sparse"][name]
        # θ′ = round((θ0 + φ_source) + φ_task), so nothing of φ_source is in φ_task …
        assert_bits(end, begin + phi, name)
        # … and where the task selected nothing, there is nothing, whatever the source has there.
        chosen = torch.zeros(phi.numel(), dtype=torch.bool)
        chosen[delta.indices(name)] = True
        others = source.dense(name).flatten()[~chosen]
        only_source += int((others != 0).sum())
        assert not phi.flatten()[~chosen].any()
    assert only_source > 1000
    # The entries are those that moved most from θ0 + φ_source, not from θ0.
    moved = torch.cat([(ended["full"][n] - shifted[n]).abs().flatten() for n in delta.layout.names])
    chosen = torch.cat([torch.zeros(bare[n].numel()) for n in delta.layout.names])
    offset = 0
    for name in delta.layout.names:
        chosen[offset + delta.indices(name)] = 1
        offset += bare[name].numel()
    assert moved[chosen == 1].min() >= moved[chosen == 0].max()
    # What is recorded is the bare base model, so that it goes with another language.
    assert [entry["id"] for entry in delta.meta["trained_on"]] == [source.content_id]
    start = {n: bare[n] for n in delta.layout.names}
    moved_on = {n: bare[n] + delta.dense(n) for n in start}
    assert (
        sf.SparseDelta.between(start, moved_on, support=delta.support).known_digests
        == delta.known_digests
    )
    with sf.compose(model, [delta, target], heads=delta):
        for name, value in values_of(model).items():
            if name in delta.heads:
                assert_bits(value, ended["sparse"][name], name)
            elif name in delta.layout:
                sum_ = (
                    bare[name].double() + delta.dense(name).double() + target.dense(name).double()
                )
                assert torch.allclose(value.double(), sum_, rtol=3e-7, atol=1e-7), name


# --- the L1 term --------------------------------------------------------------------------------


def counts(model: nn.Module) -> dict[str | int, int]:
    """N for every way to count."""
    tuned = trainable(model)
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in tuned.values()),
        "eligible": sum(p.numel() for n, p in tuned.items() if n.startswith("bert.")),
        12345: 12345,
    }


@pytest.mark.parametrize("l1_heads", [True, False])
@pytest.mark.parametrize("l1_numel", ["all", "trainable", "eligible", 12345])
def test_the_gradient_of_the_l1_term(l1_numel, l1_heads):
    """With β1 = 0 the first moment is the last gradient: λ/N·sign(θ − θ0), to the bit, where the
    loss has none."""
    model = bert()
    start = values_of(model)
    numel = counts(model)[l1_numel]
    assert len(set(counts(model).values())) == 4
    words = "bert.embeddings.word_embeddings.weight"
    seen = []

    def train(phase) -> None:
        lam = {"full": 0.3, "sparse": 0.7}[phase.name]
        with torch.no_grad():
            for name, parameter in trainable(phase.model).items():
                moved = torch.randn(parameter.shape) * 0.01
                if name == words:
                    moved[VOCABULARY // 2 :] = 0
                parameter += moved
        before = values_of(phase.model)
        optimizer = phase.optimizer(lr=1e-3, betas=(0.0, 0.9))
        for parameter in trainable(phase.model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        found = moments(phase, optimizer)
        coefficient = torch.tensor(lam / numel, dtype=torch.float32)
        for name, (place, moment) in found.items():
            sign = torch.sign(before[name] - start[name]).flatten()[place]
            if not l1_heads and not name.startswith("bert."):
                sign = torch.zeros_like(sign)
            assert torch.equal(moment, coefficient * sign), name
        assert found.keys() == trainable(phase.model).keys()
        # At θ0 the term is silent: words that never occur stay where they are.
        now = values_of(phase.model)[words]
        assert_bits(now[VOCABULARY // 2 :], start[words][VOCABULARY // 2 :])
        assert (now != before[words]).any()
        seen.append(phase.name)

    sf.LotteryTicket(model, density=0.9, l1=(0.3, 0.7), l1_numel=l1_numel, l1_heads=l1_heads).fit(
        train, progress=False
    )
    assert seen == ["full", "sparse"]


def moments(phase, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Any, Tensor]]:
    """Each tensor's tuned entries, and their first moments."""
    if phase.name == "full":
        tuned = trainable(phase.model)
        return {n: (slice(None), optimizer.state[p]["exp_avg"].flatten()) for n, p in tuned.items()}
    return {
        name: (unit.support.indices(name), unit.exp_avg[unit.support.entries_of(name)])
        for _, unit in optimizer._units
        for name in unit.names
    }
