"""The data order: a pure function of seed, epoch and position, however the work is cut."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from ldm import rng
from ldm.data.batch_sampler import (
    EpochBatchSampler,
    SampleKey,
    evenly_spaced,
    first_samples,
    image_batches,
    permutation,
    sample_at_position,
)


class Echo(Dataset):
    """Gives back which key it was asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        return {"image": torch.full((1, 2, 2), float(key.index)), "key": torch.tensor(key)}


def take(order: EpochBatchSampler, count: int) -> list[list[SampleKey]]:
    return list(islice(order, count))


def test_it_is_a_pure_function():
    first, second = (EpochBatchSampler(10, seed=5, batch_size=4) for _ in range(2))
    torch.manual_seed(1)
    expected = take(first, 8)
    torch.manual_seed(2)
    permutation.cache_clear()
    assert take(second, 8) == expected == take(first, 8)
    assert take(EpochBatchSampler(10, seed=6, batch_size=4), 8) != expected


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 3),
    world=st.sampled_from([1, 2, 3]),
    accumulate=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 3),
)
def test_ranks_and_accumulation_only_cut_the_order(size, seed, world, accumulate, micro):
    batch_size = world * accumulate * micro
    whole = take(EpochBatchSampler(size, seed=seed, batch_size=batch_size), 3)
    parts = [
        EpochBatchSampler(size, seed=seed, batch_size=batch_size, grad_accum_steps=accumulate, rank=rank, world=world)
        for rank in range(world)
    ]
    cut = [take(part, 3 * accumulate) for part in parts]
    for step in range(3):
        rounds = range(step * accumulate, (step + 1) * accumulate)
        assert [key for round_ in rounds for rank in cut for key in rank[round_]] == whole[step]
    assert all(len(batch) == micro for rank in cut for batch in rank)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_resumed_order_is_the_tail(step):
    options = {"seed": 3, "batch_size": 6, "grad_accum_steps": 2, "rank": 1, "world": 3}
    full = take(EpochBatchSampler(11, **options), 24)
    assert take(EpochBatchSampler(11, start=step, **options), 24 - 2 * step) == full[2 * step :]


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own():
    keys = [key for batch in take(EpochBatchSampler(12, seed=0, batch_size=4), 9) for key in batch]
    epochs = [[key.index for key in keys if key.epoch == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_span_epochs_and_positions_count_on():
    batches = take(EpochBatchSampler(5, seed=0, batch_size=4), 5)
    assert [key.epoch for key in batches[1]] == [0, 1, 1, 1]
    assert all([key.position for key in batch] == [0, 1, 2, 3] for batch in batches)


def test_sample_at_agrees_with_the_permutation():
    for place in (0, 6, 7, 20):
        index, epoch = sample_at_position(place, size=7, seed=9)
        assert epoch == place // 7 and index == permutation(7, 9, epoch)[place % 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_keeps_the_order(workers):
    order = EpochBatchSampler(9, seed=1, batch_size=3)
    loader = DataLoader(Echo(9), batch_sampler=order, num_workers=workers)
    seen = [[SampleKey(*row) for row in batch["key"].tolist()] for batch in islice(loader, 4)]
    assert seen == take(order, 4)


def test_messages():
    with pytest.raises(
        ValueError, match=r"batch_size 10 does not divide over 2 processes x grad_accum_steps 3: .* multiple of 6"
    ):
        EpochBatchSampler(5, seed=0, batch_size=10, grad_accum_steps=3, world=2)
    with pytest.raises(ValueError, match="the training set is empty"):
        EpochBatchSampler(0, seed=0, batch_size=1)


def test_first_samples_stops_at_the_end():
    assert [tuple(s["key"].tolist()) for s in first_samples(Echo(3), 5)] == [(0, 0, 0), (1, 0, 1), (2, 0, 2)]


def test_image_batches_spread_over_the_set():
    whole = [batch[:, 0, 0, 0].tolist() for batch in image_batches(Echo(5), batch_size=2)]
    assert whole == [[0, 1], [2, 3], [4]]
    assert [batch[:, 0, 0, 0].tolist() for batch in image_batches(Echo(9), evenly_spaced(3, 9))] == [[0, 3, 6]]
    assert evenly_spaced(10, 4) == [0, 1, 2, 3]


def test_draws_do_not_depend_on_how_the_batch_is_cut():
    device = torch.device("cpu")
    whole = rng.StepRNG(7, 3, range(4), 4, device)
    halves = [rng.StepRNG(7, 3, part, 4, device) for part in ([0, 1], [2, 3])]
    assert torch.equal(whole.randn("noise", (2, 3)), torch.cat([half.randn("noise", (2, 3)) for half in halves]))
    assert torch.equal(whole.rand("time"), torch.cat([half.rand("time") for half in halves]))
    assert not torch.equal(whole.rand("time"), whole.rand("dropout"))
    assert not torch.equal(whole.rand("time"), rng.StepRNG(7, 4, range(4), 4, device).rand("time"))
    assert len(set(whole.rand("time").tolist())) == 4
