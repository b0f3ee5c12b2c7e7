"""The order of samples: a pure function of seed, epoch and position, however a batch is divided."""

import pickle
from dataclasses import astuple
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from ldm.data.batch_sampler import (
    BucketBatchSampler,
    EpochBatchSampler,
    SampleKey,
    evenly_spaced,
    make_batch_sampler,
    permutation,
)
from ldm.data.loader import sample_batches


class Echo(Dataset):
    """Gives back which key it was asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        return {"image": torch.full((1, 2, 2), float(key.index)), "key": torch.tensor(astuple(key))}


def take(sampler: EpochBatchSampler, count: int) -> list[list[SampleKey]]:
    return list(islice(sampler, count))


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
    grad_accum_steps=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 3),
)
def test_ranks_and_accumulation_only_divide_the_batch(size, seed, world, grad_accum_steps, micro):
    batch_size = world * grad_accum_steps * micro
    whole = take(EpochBatchSampler(size, seed=seed, batch_size=batch_size), 3)
    parts = [
        EpochBatchSampler(
            size, seed=seed, batch_size=batch_size, grad_accum_steps=grad_accum_steps, rank=rank, world=world
        )
        for rank in range(world)
    ]
    slices = [take(part, 3 * grad_accum_steps) for part in parts]
    for step in range(3):
        micro_batches = range(step * grad_accum_steps, (step + 1) * grad_accum_steps)
        assert [key for i in micro_batches for rank in slices for key in rank[i]] == whole[step]
    assert all(len(batch) == micro for rank in slices for batch in rank)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_resumed_order_is_the_tail(step):
    options = {"seed": 3, "batch_size": 6, "grad_accum_steps": 2, "rank": 1, "world": 3}
    full = take(EpochBatchSampler(11, **options), 24)
    assert take(EpochBatchSampler(11, start=step, **options), 24 - 2 * step) == full[2 * step :]


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own():
    keys = [key for batch in take(EpochBatchSampler(12, seed=0, batch_size=4), 9) for key in batch]
    epochs = [[key.index for key in keys if key.epoch == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_span_epochs_and_positions_count_on():
    batches = take(EpochBatchSampler(5, seed=0, batch_size=4), 5)
    assert [key.epoch for key in batches[1]] == [0, 1, 1, 1]
    assert all([key.position for key in batch] == [0, 1, 2, 3] for batch in batches)


def test_keys_agree_with_the_permutation():
    sampler = EpochBatchSampler(7, seed=9, batch_size=5)
    for position in (0, 6, 7, 20):
        key = sampler.key_at(*divmod(position, 5))
        assert key.epoch == position // 7 and key.index == permutation(7, 9, key.epoch)[position % 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_keeps_the_order(workers):
    sampler = EpochBatchSampler(9, seed=1, batch_size=3)
    loader = DataLoader(Echo(9), batch_sampler=sampler, num_workers=workers)
    assert [[SampleKey(*row) for row in batch["key"].tolist()] for batch in islice(loader, 4)] == take(sampler, 4)


def test_keys_are_values():
    assert len({SampleKey(1, 0, 2), SampleKey(1, 0, 2), SampleKey(1, 0, 3)}) == 2
    assert pickle.loads(pickle.dumps(SampleKey(1, 0, 2))) == SampleKey(1, 0, 2)
    with pytest.raises(AttributeError):
        SampleKey(1, 0, 2).index = 3  # type: ignore[misc]


def test_the_batch_sampler_of_a_set_is_that_of_its_groups():
    options = {"seed": 2, "batch_size": 4, "start": 3, "rank": 1, "world": 2}
    groups = torch.tensor([0] * 9 + [1] * 3)
    assert take(make_batch_sampler(12, None, **options), 5) == take(EpochBatchSampler(12, **options), 5)
    assert take(make_batch_sampler(12, groups, **options), 5) == take(BucketBatchSampler(groups, **options), 5)


def test_messages():
    with pytest.raises(ValueError, match="batch_size 10 .* 2 ranks x grad_accum_steps 3: .*multiple of 6"):
        EpochBatchSampler(5, seed=0, batch_size=10, grad_accum_steps=3, world=2)


def test_the_first_samples_stop_at_the_end():
    assert next(sample_batches(Echo(3), batch_size=5))["key"].tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 2]]


def test_batches_of_samples_spread_over_the_set():
    whole = [batch["key"][:, 0].tolist() for batch in sample_batches(Echo(5), batch_size=2)]
    assert whole == [[0, 1], [2, 3], [4]]
    assert [batch["key"][:, 0].tolist() for batch in sample_batches(Echo(9), evenly_spaced(3, 9))] == [[0, 3, 6]]
    assert evenly_spaced(10, 4) == [0, 1, 2, 3]
