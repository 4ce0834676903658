"""Order, crops and augmentation: functions of (seed, epoch, index), whatever the workers and processes."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from dataset.cache.crops import CroppedVolume, decode, encode, find_foreground
from dataset.order.epochs import EpochSampler, SampleKey, sample_generator
from dataset.order.random_crops import MAX_DRAWS, Turn, centre_crop_start, random_crop
from dataset.volumes.intensity import foreground


def indices(sampler: EpochSampler) -> list[int]:
    return [key.index for key in sampler]


def test_each_epoch_is_a_permutation_of_its_own():
    sampler = EpochSampler(20, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert {key.epoch for key in sampler} == {epoch}
        epochs.append(indices(sampler))
        assert sorted(epochs[-1]) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2]
    again = EpochSampler(20, seed=3)
    again.set_epoch(1)
    assert indices(again) == epochs[1]
    assert indices(EpochSampler(20, seed=4)) != epochs[0]
    assert indices(EpochSampler(20, shuffle=False)) == list(range(20))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_walk_the_data_as_one_does(world_size):
    one = indices(EpochSampler(12))
    shares = [indices(EpochSampler(12, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [index for together in zip(*shares, strict=True) for index in together] == one


@pytest.mark.parametrize(
    ("length", "world_size", "drop_last", "expected"),
    [(10, 4, False, 3), (10, 4, True, 2), (1, 4, False, 1), (8, 4, False, 2), (8, 4, True, 2)],
)
def test_every_process_has_as_many_samples(length, world_size, drop_last, expected):
    samplers = [
        EpochSampler(length, rank=rank, world_size=world_size, drop_last=drop_last) for rank in range(world_size)
    ]
    assert [len(sampler) for sampler in samplers] == [expected] * world_size
    seen = [index for sampler in samplers for index in indices(sampler)]
    assert len(seen) == expected * world_size
    assert set(seen) <= set(range(length))
    if drop_last:
        assert len(set(seen)) == len(seen)
    else:
        assert set(seen) == set(range(length))


def test_resume_goes_on_with_the_same_samples():
    whole = EpochSampler(10, rank=1, world_size=2, seed=5)
    whole.set_epoch(3)
    expected = indices(whole)
    whole.set_epoch(4)
    expected_next = indices(whole)

    resumed = EpochSampler(10, rank=1, world_size=2, seed=5)
    resumed.resume(epoch=3, position=2)
    resumed.set_epoch(3)  # as a training loop does before each epoch: the position stays
    assert len(resumed) == 3
    assert indices(resumed) == expected[2:]
    assert len(resumed) == 5
    resumed.set_epoch(4)
    assert indices(resumed) == expected_next


@pytest.mark.parametrize(("length", "world_size", "drop_last"), [(0, 1, False), (3, 4, True)])
def test_too_few_samples_for_the_processes(length, world_size, drop_last):
    with pytest.raises(UserError, match=f"{length} samples are too few for {world_size} processes"):
        EpochSampler(length, world_size=world_size, drop_last=drop_last)


def test_rank_and_position_are_checked():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EpochSampler(4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="position 5"):
        EpochSampler(4).resume(0, 5)


def test_generator_depends_on_seed_epoch_and_index_only():
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)]
    torch.manual_seed(0)
    first = [sample_generator(*key).random() for key in keys]
    torch.manual_seed(1)
    assert [sample_generator(*key).random() for key in keys] == first
    assert len(set(first)) == len(first)


def test_no_global_random_state_is_touched():
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    rng = sample_generator(0, 0, 0)
    Turn.draw(rng).apply(torch.zeros(1, 8, 8, 8))
    random_crop(masked(np.ones((8, 8, 8), dtype=bool)), (4, 4, 4), rng)
    indices(EpochSampler(8))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


# Crops


class CountingVolume(CroppedVolume):
    """Knows how many crops were read."""

    reads = 0

    def crop(self, start, size):
        self.reads += 1
        return super().crop(start, size)


def masked(mask: np.ndarray) -> CountingVolume:
    """A volume with the value 0.5 in the mask and background elsewhere."""
    return CountingVolume(np.where(mask, np.float32(0.5), np.float32(-1)), np.eye(4))


def crop_start(volume: CroppedVolume, size: tuple[int, int, int], rng: np.random.Generator, keep: float = 1.0):
    """Where `random_crop` begins, after a look at whether that is what it gives."""
    start, data = random_crop(volume, size, rng, keep)
    assert torch.equal(data, volume.crop(start, size))
    assert (data > -1).any()
    return start


@pytest.mark.parametrize(
    ("voxel", "num_crops"), [((0, 0, 0), 1), ((31, 31, 31), 1), ((31, 0, 16), 4), ((1, 0, 30), 4), ((17, 3, 30), 32)]
)
def test_one_foreground_voxel_is_found(voxel, num_crops):
    mask = np.zeros((32, 32, 32), dtype=bool)
    mask[voxel] = True
    volume = masked(mask)
    starts = {crop_start(volume, (4, 4, 4), np.random.default_rng(seed)) for seed in range(400)}
    assert all(0 <= first <= 28 for start in starts for first in start)
    assert len(starts) == num_crops  # every crop that holds the voxel occurs


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_search_for_foreground_is_bounded(keep):
    """Two voxels in opposite corners: nearly all crops that overlap their box are all background."""
    mask = np.zeros((64, 64, 64), dtype=bool)
    mask[0, 0, 0] = mask[63, 63, 63] = True
    starts = set()
    for seed in range(20):
        volume = masked(mask)
        start, crop = random_crop(volume, (2, 2, 2), np.random.default_rng(seed), keep)
        assert (crop > -1).sum() == 1
        assert volume.reads == MAX_DRAWS + 1
        starts.add(start)
    assert starts == {(0, 0, 0), (62, 62, 62)}


def test_crops_are_uniform_where_all_is_foreground():
    volume = masked(np.ones((6, 5, 4), dtype=bool))
    rng = np.random.default_rng(0)
    starts = [crop_start(volume, (3, 3, 4), rng) for _ in range(1200)]
    counts = np.unique(np.array(starts), axis=0, return_counts=True)[1]
    assert len(counts) == 4 * 3 * 1
    assert counts.min() > 60
    assert counts.max() < 145


def test_crops_with_foreground_are_uniform_wherever_it_lies():
    """Two voxels on one line, whose box has background between them: 4 + 4 crops of 12 hold one."""
    mask = np.zeros((20, 1, 1), dtype=bool)
    mask[[5, 13]] = True
    volume, rng = masked(mask), np.random.default_rng(0)
    starts = [crop_start(volume, (4, 1, 1), rng)[0] for _ in range(1200)]
    places, counts = np.unique(starts, return_counts=True)
    assert places.tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert counts.min() > 105
    assert counts.max() < 195


def test_only_crops_that_overlap_the_foreground_are_looked_at():
    """A solid block in a large volume: the first draw has foreground, wherever it falls."""
    mask = np.zeros((48, 48, 48), dtype=bool)
    mask[20:24, 30:34, 3:7] = True
    for seed in range(50):
        volume = masked(mask)
        random_crop(volume, (4, 4, 4), np.random.default_rng(seed))
        assert volume.reads == 1


@pytest.mark.parametrize(("keep", "low", "high"), [(0.0, 0.0, 0.0), (0.3, 0.4, 0.57), (1.0, 0.69, 0.83)])
def test_sparse_crops_are_thinned(keep, low, high):
    """22 of the 29 crops are sparse: keeping them with probability k leaves them a share of 22 k / (22 k + 7)."""
    mask = np.zeros((32, 8, 8), dtype=bool)
    mask[4:8] = True
    mask[::4, 0, 0] = True  # every crop has a little foreground
    volume, rng = masked(mask), np.random.default_rng(0)
    starts = [crop_start(volume, (4, 8, 8), rng, keep) for _ in range(400)]
    sparse = np.mean([mask[start[0] : start[0] + 4].mean() < 0.1 for start in starts])
    assert low <= sparse <= high


def test_volume_of_sparse_crops_only_gives_the_fullest():
    mask = np.zeros((16, 4, 4), dtype=bool)
    mask[::4, 0, 0] = True
    mask[6, 1, :3] = True  # 4 of 64 voxels at most
    start = crop_start(masked(mask), (4, 4, 4), np.random.default_rng(0), 0.0)
    assert start[0] in (3, 4, 5, 6)
    assert mask[start[0] : start[0] + 4].sum() == 4


def test_the_only_crop_is_taken_without_a_look_at_the_foreground():
    volume = masked(np.zeros((4, 4, 4), dtype=bool))
    start, data = random_crop(volume, (4, 4, 4), np.random.default_rng(0))
    assert (start, data.shape, volume.reads) == ((0, 0, 0), (1, 4, 4, 4), 1)


def test_short_axes_get_background_on_both_sides():
    mask = np.ones((3, 9, 4), dtype=bool)
    starts = {crop_start(masked(mask), (8, 6, 4), np.random.default_rng(seed)) for seed in range(40)}
    assert starts == {(-2, h, 0) for h in range(4)}
    data = masked(mask).crop((-2, 0, 0), (8, 6, 4))
    assert (data[0, [0, 1, 5, 6, 7]] == -1).all()
    assert (data[0, 2:5] == 0.5).all()


def test_foreground_of_a_volume():
    mask = np.zeros((6, 5, 4), dtype=bool)
    mask[2, 1:4, 3] = mask[4, 2, 1] = True
    found = find_foreground(mask)
    assert (found.first.tolist(), found.last.tolist()) == ([2, 1, 1], [4, 3, 3])
    assert found.voxels.tolist() == [[2, 1, 3], [2, 2, 3], [2, 3, 3], [4, 2, 1]]
    with pytest.raises(ValueError, match="without foreground"):
        find_foreground(np.zeros((2, 2, 2), dtype=bool))


def test_remembered_voxels_are_bounded_different_and_everywhere():
    mask = np.random.default_rng(0).random((32, 32, 32)) < 0.5
    voxels = find_foreground(mask).voxels
    assert voxels.shape == (256, 3)
    assert mask[tuple(voxels.T)].all()
    assert len(np.unique(voxels, axis=0)) == 256
    assert (np.abs(voxels.mean(axis=0) - 15.5) < 2).all()
    assert np.array_equal(find_foreground(mask).voxels, voxels)


def test_codes_are_exact_at_the_ends_and_keep_the_foreground():
    values = np.concatenate([np.linspace(-1, 1, 100_001), -0.998 + np.linspace(-1e-4, 1e-4, 20_001)])
    values = values.astype(np.float32)
    decoded = decode(encode(values, "int16"))
    assert decoded.dtype == np.float32
    assert 1e-5 < np.abs(decoded - values).max() < 1.6e-5
    assert decode(encode(np.array([-1, 0, 1], dtype=np.float32), "int16")).tolist() == [-1, 0, 1]
    assert (foreground(decoded) >= foreground(values)).all()
    assert np.array_equal(decode(encode(values, "float32")), values)


def test_centre_crop():
    assert centre_crop_start((10, 7, 4), (4, 4, 4)) == (3, 1, 0)


# Augmentation


class Choices:
    """Stands in for the generator: flips and turns as told."""

    def __init__(self, *chosen: bool):
        self.chosen = np.where(chosen, 0.0, 0.9)

    def random(self, count: int) -> np.ndarray:
        assert count == len(self.chosen)
        return self.chosen


def volume(d: int, h: int, w: int) -> torch.Tensor:
    return torch.arange(d * h * w, dtype=torch.float32).reshape(1, d, h, w)


def test_flips_and_turn_known_answers():
    data = volume(2, 3, 3)
    assert torch.equal(Turn.draw(Choices(False, False, False)).apply(data), data)
    assert torch.equal(Turn.draw(Choices(True, False, False)).apply(data), data[:, :, [2, 1, 0]])
    assert torch.equal(Turn.draw(Choices(False, True, False)).apply(data), data[:, :, :, [2, 1, 0]])
    turned = Turn.draw(Choices(False, False, True)).apply(data)
    assert turned[0, 1, 0].tolist() == data[0, 1, :, 2].tolist()
    assert turned.is_contiguous()


def test_planes_that_are_not_square_are_not_turned():
    data = volume(2, 3, 4)
    assert torch.equal(Turn.draw(Choices(False, False, True)).apply(data), data)
    assert Turn.draw(Choices(True, True, True)).apply(data).shape == data.shape


def test_each_augmentation_is_as_frequent():
    data, rng = volume(1, 2, 2), np.random.default_rng(0)
    seen = [tuple(Turn.draw(rng).apply(data).flatten().tolist()) for _ in range(800)]
    counts = np.unique(np.array(seen), axis=0, return_counts=True)[1]
    assert len(counts) == 8  # four flips, each with and without the turn: all symmetries of the square
    assert counts.min() > 65
    assert counts.max() < 135


def test_keys_are_plain_tuples():
    key = SampleKey(2, 5)
    assert key == (2, 5)
    assert (key.epoch, key.index) == (2, 5)
