"""Batches: the same steps on any number of ranks, each token once an epoch, resumed exactly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normuon_lab.data.batches import PretrainData
from normuon_lab.data.config import DataConfig
from normuon_lab.data.loading import open_data
from normuon_lab.errors import InputError
from tests.lab.data.conftest import signal_from_elsewhere, write_shard

LENGTH = 10
SEQUENCES = 60
BATCH = 12

MakeShards = Callable[[int, int], list[Path]]


@pytest.fixture
def config(counted_shards: MakeShards) -> DataConfig:
    """60 sequences of training data in shards of odd sizes, whose first tokens are 10 i."""
    paths = counted_shards(SEQUENCES * LENGTH + 1, 77)
    folder = paths[0].parent / "validation"
    folder.mkdir()
    validation = write_shard(folder / "validation.bin", range(1000, 1101))
    return DataConfig(
        source=tuple(map(str, paths)),
        validation=(str(validation),),
        vocab_size=2000,
        workers=0,
    )


def opened(config: DataConfig, *, seed: int = 0) -> PretrainData:
    return open_data(config, sequence_length=LENGTH, seed=seed)


def steps(data: PretrainData, *, world_size: int = 1, micro: int = 3) -> Iterator[Tensor]:
    """Whole steps, put together from every rank's micro batches in order of the ranks."""
    ranks = [
        data.train_batches(
            global_batch_size=BATCH, micro_batch_size=micro, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    while True:
        yield torch.cat([torch.cat(list(islice(r, r.share.micro_batches_per_step))) for r in ranks])


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 12), (2, 2), (2, 6), (3, 4), (4, 3)])
def test_a_step_is_the_same_on_any_number_of_ranks(
    config: DataConfig, world_size: int, micro: int
) -> None:
    data = opened(config)
    expected = list(islice(steps(data), 7))
    found = list(islice(steps(data, world_size=world_size, micro=micro), 7))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_token_is_predicted_once_an_epoch(config: DataConfig) -> None:
    data = opened(config)
    epochs = [torch.cat(list(islice(steps(data), SEQUENCES // BATCH)))]
    assert epochs[0].shape == (SEQUENCES, LENGTH + 1)
    assert epochs[0].dtype == torch.int64
    targets = Counter(epochs[0][:, 1:].flatten().tolist())
    assert targets == Counter(range(1, SEQUENCES * LENGTH + 1))
    both = list(islice(steps(data), 2 * SEQUENCES // BATCH))
    second = torch.cat(both[SEQUENCES // BATCH :])
    assert Counter(second[:, 0].tolist()) == Counter(epochs[0][:, 0].tolist())
    assert not torch.equal(second, epochs[0])


def test_sequences_are_runs_of_the_data(config: DataConfig) -> None:
    step = next(steps(opened(config)))
    assert torch.equal(step, step[:, :1] + torch.arange(LENGTH + 1))
    assert (step[:, 0] % LENGTH == 0).all()


def test_the_order_follows_the_seed(config: DataConfig) -> None:
    first, again, other = (next(steps(opened(config, seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_may_straddle_epochs(config: DataConfig) -> None:
    data = opened(config)
    batches = data.train_batches(global_batch_size=25, micro_batch_size=25, rank=0, world_size=1)
    firsts = torch.cat(list(islice(batches, 12)))[:, 0].tolist()
    for epoch in range(5):
        own = firsts[epoch * SEQUENCES : (epoch + 1) * SEQUENCES]
        assert sorted(own) == [LENGTH * i for i in range(SEQUENCES)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3, 8])
def test_a_saved_position_is_what_was_taken_not_what_was_loaded(
    config: DataConfig, workers: int, taken: int
) -> None:
    data = opened(replace(config, workers=workers))
    expected = list(islice(steps(data), taken + 4))

    batches = data.train_batches(global_batch_size=BATCH, micro_batch_size=4, rank=0, world_size=1)
    list(islice(batches, 3 * taken))
    state = json.loads(json.dumps(batches.state_dict()))
    batches.close()
    assert state["sequences"] == taken * BATCH

    for world_size in (1, 3):
        resumed = [
            opened(config).train_batches(
                global_batch_size=BATCH, micro_batch_size=2, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]
        for one in resumed:
            one.load_state_dict(state)
        for step in expected[taken:]:
            count = resumed[0].share.micro_batches_per_step
            assert torch.equal(torch.cat([b for r in resumed for b in islice(r, count)]), step)


def test_every_rank_saves_the_same_position(config: DataConfig) -> None:
    states = []
    for rank, world_size in [(0, 1), (0, 3), (2, 3)]:
        batches = opened(config).train_batches(
            global_batch_size=BATCH, micro_batch_size=2, rank=rank, world_size=world_size
        )
        list(islice(batches, 4 * batches.share.micro_batches_per_step))
        states.append(batches.state_dict())
    assert states[0] == states[1] == states[2]
    assert states[0]["sequences"] == 4 * BATCH


@pytest.mark.parametrize("workers", [0, 1])
def test_a_running_loader_goes_back_to_a_position(config: DataConfig, workers: int) -> None:
    batches = opened(replace(config, workers=workers)).train_batches(
        global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1
    )
    next(batches)
    state = batches.state_dict()
    first = list(islice(batches, 3))
    batches.load_state_dict(state)
    again = list(islice(batches, 3))
    batches.close()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_position_inside_a_step_is_refused(config: DataConfig) -> None:
    batches = opened(config).train_batches(
        global_batch_size=BATCH, micro_batch_size=4, rank=0, world_size=1
    )
    next(batches)
    with pytest.raises(RuntimeError, match="1 of 3 micro batches"):
        batches.state_dict()


def test_loading_leaves_the_global_generator_alone(config: DataConfig) -> None:
    """A run restores it, and then opens its loaders."""
    data = opened(replace(config, workers=1))
    before = torch.get_rng_state()
    batches = data.train_batches(global_batch_size=BATCH, micro_batch_size=4, rank=0, world_size=1)
    next(batches)
    batches.close()
    list(data.validation_batches(tokens=50, batch_size=2, rank=0, world_size=1))
    assert torch.equal(torch.get_rng_state(), before)


def state_of(data: PretrainData) -> dict[str, Any]:
    batches = data.train_batches(global_batch_size=BATCH, micro_batch_size=4, rank=0, world_size=1)
    return batches.state_dict()


def test_a_position_in_other_data_is_refused(config: DataConfig, tmp_path: Path) -> None:
    state = state_of(opened(config))

    def load(data: PretrainData) -> None:
        data.train_batches(
            global_batch_size=BATCH, micro_batch_size=4, rank=0, world_size=1
        ).load_state_dict(state)

    load(opened(config))
    with pytest.raises(InputError, match="its seed is 0 and this run's is 1"):
        load(opened(config, seed=1))
    with pytest.raises(InputError, match="its sequence_length is 10"):
        load(open_data(config, sequence_length=5, seed=0))
    path = Path(config.source[0])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="its fingerprint is"):
        load(opened(config))


def test_loading_processes_outlive_the_signals_of_a_scheduler(config: DataConfig) -> None:
    """SIGTERM goes to every process of a job; the run still needs its last batches."""
    data = opened(replace(config, workers=1, prefetch=1))
    expected = list(islice(steps(data), 6))
    batches = data.train_batches(
        global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1
    )
    assert torch.equal(next(batches), expected[0])
    (process,) = batches._loaded._workers  # type: ignore[union-attr]
    signal_from_elsewhere(process.pid)
    for step in expected[1:]:
        assert torch.equal(next(batches), step)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert not process.is_alive()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_during_a_run_is_one_line(config: DataConfig, workers: int) -> None:
    data = opened(replace(config, workers=workers))
    batches = data.train_batches(global_batch_size=BATCH, micro_batch_size=4, rank=0, world_size=1)
    Path(config.source[3]).unlink()
    with pytest.raises(
        InputError, match=r"^cannot read the shard .*part-003\.bin: No such file"
    ) as e:
        list(islice(batches, 20))
    assert "\n" not in str(e.value)
    batches.close()


def test_tokens_outside_the_vocabulary_are_one_line(config: DataConfig) -> None:
    batches = opened(replace(config, vocab_size=100)).train_batches(
        global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1
    )
    with pytest.raises(InputError, match="the vocabulary has 100: they were written with another"):
        list(islice(batches, 5))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_an_evaluation_reads_the_same_sequences_on_any_number_of_ranks(
    config: DataConfig, world_size: int
) -> None:
    data = opened(config)
    shares = [
        list(data.validation_batches(tokens=59, batch_size=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    rows = torch.cat([batch for share in shares for batch in share])
    assert rows[:, 0].tolist() == [1000, 1020, 1040, 1060, 1080]
    assert all(1 <= len(batch) <= 2 for share in shares for batch in share)
    # The same again: an evaluation starts from the beginning.
    batches = data.validation_batches(tokens=59, batch_size=2, rank=0, world_size=1)
    assert torch.equal(torch.cat(list(batches)), torch.cat(list(batches)))


def test_sizes_that_do_not_fit_are_told(config: DataConfig) -> None:
    data = opened(config)
    with pytest.raises(InputError, match="12 sequences does not split over 5 data-parallel ranks"):
        data.train_batches(global_batch_size=12, micro_batch_size=1, rank=0, world_size=5)
    with pytest.raises(InputError, match="60 sequences of 10; one batch takes 64: give more data"):
        data.train_batches(global_batch_size=64, micro_batch_size=1, rank=0, world_size=1)
    with pytest.raises(InputError, match="has 10 sequences, but an evaluation reads 11"):
        data.validation_batches(tokens=110, batch_size=1, rank=0, world_size=1)
    with pytest.raises(InputError, match="less than one sequence"):
        data.validation_batches(tokens=9, batch_size=1, rank=0, world_size=1)


def test_without_a_validation_source_the_last_tokens_are_held_out(config: DataConfig) -> None:
    data = opened(replace(config, validation=(), validation_fraction=0.1))
    assert data.describe()["train_tokens"] == 541
    assert data.describe()["validation_tokens"] == 60
    trained = torch.cat(list(islice(steps(data), 10)))
    held_out = torch.cat(
        list(data.validation_batches(tokens=50, batch_size=9, rank=0, world_size=1))
    )
    assert not set(trained.flatten().tolist()) & set(held_out.flatten().tolist())
