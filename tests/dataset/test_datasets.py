"""The public data sets on tiny volumes: items, split, crops, reproducibility, and clear errors."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from dataset.order.epochs import EpochSampler, SampleKey
from dataset.Singleres_dataset import Singleres_dataset
from dataset.tr_generate import GenerateTrData_dataset
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.index import latent_folder
from dataset.volumes.latent_record import read_latent_record
from dataset.volumes.volume_io import tensor_to_nifti, write_latent, write_volume
from dataset.vqgan import CropRule, VQGANDataset
from dataset.vqgan_4x import VQGANDataset_4x

AFFINE = affine_from_spacing((1.0, 2.0, 3.0))


def random_volume(seed: int, shape: tuple[int, int, int] = (12, 10, 8)) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def make_folder(folder: Path, count: int, shape: tuple[int, int, int] = (12, 10, 8)) -> Path:
    for i in range(count):
        write_volume(folder / f"{i:02d}.nii.gz", random_volume(i, shape), AFFINE)
    return folder


def make_json(path: Path, folders: dict[str, str]) -> Path:
    path.write_text(json.dumps(folders))
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    make_folder(tmp_path / "A", 6)
    make_folder(tmp_path / "B", 3)
    return make_json(tmp_path / "set.json", {"A": "A", "B": "B"})


def same_item(first: dict, second: dict) -> bool:
    return torch.equal(first["data"], second["data"])


# Items


def test_stage_1_items(root):
    data = VQGANDataset(root, False, "train", 1, 4)
    assert len(data) == 5 + 2
    for index in range(len(data)):
        item = data[index]
        assert list(item) == ["data"]
        assert item["data"].shape == (1, 4, 4, 4)
        assert item["data"].dtype == torch.float32
        assert data.item_shape(index) == (4, 4, 4)
        whole = random_volume(int(data.files[index].name[:2])).unfold(0, 4, 1).unfold(1, 4, 1).unfold(2, 4, 1)
        assert (whole == item["data"][0]).flatten(3).all(-1).any()  # it is a part of its file


def test_stage_2_items_are_whole_volumes_with_their_exact_size(root):
    data = VQGANDataset(root, False, "train", 2, 8)  # 12 x 10 x 8 does not divide into patches: nothing is cut
    assert torch.equal(data[0]["data"][0], random_volume(int(data.files[0].name[:2])))
    assert data.item_shape(0) == (12, 10, 8)


@pytest.mark.parametrize("stage", [1, 2])
def test_validation_items(root, stage):
    data = VQGANDataset(root, True, "val", stage, 4)
    assert len(data) == 1 + 1
    item = data[1]
    assert sorted(item) == ["affine", "data", "path"]
    assert torch.equal(item["data"][0], random_volume(int(Path(item["path"]).name[:2])))  # whole, not augmented
    torch.testing.assert_close(item["affine"], torch.from_numpy(AFFINE).float())


def test_split_has_no_overlap_and_is_the_same_every_time(root):
    training, validation = (VQGANDataset(root, split=split, patch_size=4) for split in ("train", "val"))
    assert not set(training.files) & set(validation.files)
    assert len({path.parent.name for path in validation.files}) == 2
    random.seed(5)
    assert VQGANDataset(root, split="val", patch_size=4).files == validation.files
    assert len(VQGANDataset(root, split="val", patch_size=4, val_fraction=0)) == 0
    assert len(VQGANDataset(root, split="train", patch_size=4, val_fraction=0)) == 9


def test_single_files_train_and_validate(tmp_path, caplog):
    make_folder(tmp_path / "A", 1)
    root = make_json(tmp_path / "set.json", {"A": "A"})
    assert len(VQGANDataset(root, split="train", patch_size=4)) == 1
    with caplog.at_level(logging.WARNING):
        assert len(VQGANDataset(root, split="val", patch_size=4)) == 1
    assert "validation uses the training files" in caplog.text


def test_intensities_are_mapped(tmp_path):
    write_volume(tmp_path / "A" / "a.nii.gz", (random_volume(0) + 1) * 500, AFFINE)
    root = make_json(tmp_path / "set.json", {"0": "A"})
    item = VQGANDataset(root, stage=2, intensity_range=(0, 1000))[0]
    torch.testing.assert_close(item["data"][0], random_volume(0), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"a\.nii\.gz.*outside the declared range \[-1, 1\]"):
        VQGANDataset(root, stage=2)[0]
    volume, _ = Singleres_dataset(root, generate_latents=True, intensity_range=(0, 1000))[0]
    torch.testing.assert_close(volume[0], random_volume(0), atol=1e-5, rtol=0)


# Patches and crops


def test_small_volumes_are_padded_with_one_warning(tmp_path, caplog):
    make_folder(tmp_path / "A", 3, shape=(3, 4, 9))
    root = make_json(tmp_path / "set.json", {"A": "A"})
    with caplog.at_level(logging.WARNING):
        data = VQGANDataset(root, patch_size=8)
        items = [data[index]["data"] for index in range(2)]
    assert caplog.text.count("smaller than a patch of 8 voxels") == 1
    assert "2 of 2 volumes" in caplog.text
    for item in items:
        assert item.shape == (1, 8, 8, 8)
        assert (item == -1).sum() == 512 - 3 * 4 * 8
        assert (item[:, 2:5, 2:6] > -1).all()


def test_patches_are_never_all_background(tmp_path):
    volume = torch.full((24, 24, 24), -1.0)
    volume[20, 3, 11] = 0.5
    write_volume(tmp_path / "A" / "a.nii.gz", volume, AFFINE)
    data = VQGANDataset(make_json(tmp_path / "set.json", {"A": "A"}), True, patch_size=4)
    patches = [data[SampleKey(epoch, 0)]["data"] for epoch in range(20)]
    assert all((patch == 0.5).sum() == 1 for patch in patches)
    assert len({int(patch.argmax()) for patch in patches}) > 5


def test_all_background_volume_is_refused(tmp_path):
    write_volume(tmp_path / "A" / "empty.nii.gz", torch.full((8, 8, 8), -1.0), AFFINE)
    root = make_json(tmp_path / "set.json", {"0": "A"})
    for stage in (1, 2):
        with pytest.raises(UserError, match=r"empty\.nii\.gz: all background"):
            VQGANDataset(root, stage=stage, patch_size=4)[0]
    with pytest.raises(UserError, match=r"empty\.nii\.gz: all background"):
        Singleres_dataset(root, generate_latents=True)[0]


def test_background_is_thinned(tmp_path):
    volume = torch.full((32, 8, 8), -1.0)
    volume[4:8] = random_volume(0, (4, 8, 8)).abs()
    volume[::4, 0, 0] = 0.0
    write_volume(tmp_path / "A" / "a.nii.gz", volume, AFFINE)
    root = make_json(tmp_path / "set.json", {"A": "A"})
    shares = []
    for keep in (0.0, 1.0):
        data = VQGANDataset(root, patch_size=8, background_keep=keep)
        full = [(data[SampleKey(epoch, 0)]["data"] > -0.998).float().mean() >= 0.1 for epoch in range(60)]
        shares.append(sum(full) / 60)
    assert shares[0] == 1
    assert 0.1 < shares[1] < 0.7


@pytest.mark.parametrize(
    ("dataset_class", "shape", "train_size", "val_size"),
    [
        (VQGANDataset, (128, 256, 256), (128, 256, 256), (128, 256, 256)),
        (VQGANDataset, (129, 256, 256), (129, 192, 192), (129, 256, 256)),
        (VQGANDataset, (256, 256, 257), (192, 192, 192), (256, 256, 256)),
        (VQGANDataset, (512, 100, 512), (192, 100, 192), (256, 100, 256)),
        (VQGANDataset_4x, (64, 512, 256), (64, 512, 256), (64, 512, 256)),
        (VQGANDataset_4x, (129, 256, 256), (128, 256, 256), (128, 256, 256)),
        (VQGANDataset_4x, (100, 512, 512), (100, 256, 256), (100, 256, 256)),
        (VQGANDataset_4x, (512, 512, 512), (128, 256, 256), (128, 256, 256)),
    ],
)
def test_crop_sizes_of_large_volumes(dataset_class, shape, train_size, val_size):
    assert dataset_class.train_crop.crop_size(shape) == train_size
    assert dataset_class.val_crop.crop_size(shape) == val_size


class SmallCrops(VQGANDataset):
    train_crop = CropRule(12 * 10 * 7, (6, 4, 20))
    val_crop = CropRule(12 * 10 * 7, (6, 4, 20))


def test_large_volumes_are_cropped(root):
    data = SmallCrops(root, False, "train", 2)
    crops = [data[SampleKey(epoch, 0)]["data"] for epoch in range(10)]
    assert {tuple(crop.shape) for crop in crops} == {(1, 6, 4, 8)}
    assert len({float(crop.sum()) for crop in crops}) > 5

    validation = SmallCrops(root, False, "val", 2)
    item, whole = validation[0], random_volume(int(validation.files[0].name[:2]))
    assert torch.equal(item["data"][0], whole[3:9, 3:7])
    voxel = item["affine"].double().numpy() @ [0, 0, 0, 1]  # where the crop begins in the file: x = 3, y = 0, z = 3
    np.testing.assert_allclose(voxel, AFFINE @ [3, 0, 3, 1])
    assert tensor_to_nifti(item["data"]).shape == (1, 4, 8, 6)


# Reproducibility


def loader(data: VQGANDataset, num_workers: int, **options: object) -> DataLoader:
    return DataLoader(data, batch_size=2, num_workers=num_workers, persistent_workers=num_workers > 0, **options)


def test_items_depend_on_seed_epoch_and_index_only(root):
    """Two epochs with an `EpochSampler`: no worker and two persistent ones give the same, and the epochs differ."""
    seen = {}
    for num_workers in (0, 2):
        torch.manual_seed(num_workers)
        data = VQGANDataset(root, True, patch_size=6, seed=7)
        sampler = EpochSampler(len(data), seed=7)
        batches = loader(data, num_workers, sampler=sampler)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            seen[num_workers, epoch] = torch.cat([batch["data"] for batch in batches])
    assert torch.equal(seen[0, 0], seen[2, 0])
    assert torch.equal(seen[0, 1], seen[2, 1])
    assert not torch.equal(seen[0, 0].flatten(1).sum(1).sort()[0], seen[0, 1].flatten(1).sum(1).sort()[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_epoch_reaches_persistent_workers(root, num_workers):
    """With any other sampler, which yields plain indices, `set_epoch` of the data set decides."""
    data = VQGANDataset(root, True, patch_size=6)
    batches = loader(data, num_workers, shuffle=False)
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(torch.cat([batch["data"] for batch in batches]))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1][3], data[SampleKey(1, 3)]["data"])


def test_seed_changes_the_crops(root):
    items = [VQGANDataset(root, patch_size=6, seed=seed)[0] for seed in (0, 0, 1)]
    assert same_item(items[0], items[1])
    assert not same_item(items[0], items[2])


def test_no_global_random_state_is_touched(root):
    torch.manual_seed(0)
    random.seed(0)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    data = VQGANDataset(root, True, patch_size=6)
    for index in range(3):
        data[index]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_augmentation_only_where_asked(root):
    plain = VQGANDataset(root, False, stage=2)
    turned = VQGANDataset(root, True, stage=2)
    wholes = [plain[SampleKey(epoch, 0)] for epoch in range(8)]
    assert all(same_item(item, wholes[0]) for item in wholes)
    assert not all(same_item(turned[SampleKey(epoch, 0)], wholes[0]) for epoch in range(8))
    first, second = turned[SampleKey(1, 0)]["data"], wholes[0]["data"]
    assert torch.equal(first.flatten().sort()[0], second.flatten().sort()[0])


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "choose"),
        ({"stage": 3}, r"model\.stage is 3"),
        ({"patch_size": 0}, r"dataset\.patch_size is 0"),
        ({"background_keep": 1.5}, r"dataset\.background_keep is 1\.5"),
        ({"val_fraction": 1.0}, r"dataset\.val_fraction"),
        ({"intensity_range": (1, 0)}, r"dataset\.intensity_range"),
    ],
)
def test_options_are_checked(root, options, message):
    with pytest.raises(UserError, match=message):
        VQGANDataset(root, **options)


def test_unfit_files_are_found_by_their_headers_at_once(root):
    (root.parent / "A" / "99.nii.gz").write_bytes(b"no image")
    for construct in (
        lambda: VQGANDataset(root, patch_size=4, val_fraction=0),
        lambda: GenerateTrData_dataset(root.parent / "A"),
        lambda: Singleres_dataset(make_json(root.parent / "classes.json", {"0": "A"}), generate_latents=True),
    ):
        with pytest.raises(UserError, match=r"99\.nii\.gz: not a NIfTI"):
            construct()


# Latents


@pytest.fixture
def classes(tmp_path) -> Path:
    for name, count in (("A_latents", 2), ("B_latents", 1)):
        for i in range(count):
            write_latent(tmp_path / name / f"{i}.nii.gz", torch.full((4, 2, 3, 3), float(i)))
    return make_json(tmp_path / "latents.json", {"1": "B_latents", "0": "A_latents"})


def test_latent_items(classes):
    data = Singleres_dataset(classes, resolution=[2, 3, 3])
    assert len(data) == 3
    assert data.num_channels == 4
    assert data.labels == [0, 0, 1]
    latent, label, resolution = data[1]
    assert torch.equal(latent, torch.ones(4, 2, 3, 3))
    assert (label.dtype, int(label)) == (torch.int64, 0)
    torch.testing.assert_close(resolution, torch.tensor([2 / 64, 3 / 64, 3 / 64]))
    batch = next(iter(DataLoader(data, batch_size=3, sampler=EpochSampler(3, shuffle=False))))
    assert [tuple(part.shape) for part in batch] == [(3, 4, 2, 3, 3), (3,), (3, 3)]
    assert batch[1].tolist() == [0, 0, 1]


def test_volumes_to_encode_and_where_their_latents_belong(root):
    classes = make_json(root.parent / "classes.json", {"0": "A", "1": "B"})
    data = Singleres_dataset(classes, generate_latents=True)
    volume, path = data[7]
    assert torch.equal(volume[0], random_volume(1))
    assert path == str(root.parent / "B" / "01.nii.gz")
    assert data.latent_paths[7] == root.parent / "B_latents" / "01.nii.gz"
    assert data.shapes[7] == (12, 10, 8)
    assert not data.latent_paths[7].parent.exists()


def test_folder_name_within_other_names(tmp_path):
    make_folder(tmp_path / "CT" / "CT_CT" / "CT", 1)
    data = Singleres_dataset(make_json(tmp_path / "s.json", {"0": "CT/CT_CT/CT"}), generate_latents=True)
    assert data.latent_paths == [tmp_path / "CT" / "CT_CT" / "CT_latents" / "00.nii.gz"]


def test_two_classes_of_different_sizes(classes):
    write_latent(classes.parent / "B_latents" / "0.nii.gz", torch.zeros(4, 2, 4, 4))
    with pytest.raises(UserError, match=r"B_latents.*2x4x4.*one size is needed, 2x3x3.*2x3x3, 2x4x4"):
        Singleres_dataset(classes, resolution=[2, 3, 3])


def test_other_resolution(classes):
    with pytest.raises(UserError, match=r"2x3x3, but 32x32x32 is needed: give --resolution 2 3 3"):
        Singleres_dataset(classes)


def test_other_channels(classes):
    write_latent(classes.parent / "B_latents" / "0.nii.gz", torch.zeros(8, 2, 3, 3))
    with pytest.raises(UserError, match="8 channels, but .* has 4"):
        Singleres_dataset(classes, resolution=[2, 3, 3])


def test_volumes_in_place_of_latents(root):
    classes = make_json(root.parent / "classes.json", {"0": "A"})
    with pytest.raises(UserError, match="a volume of size .*, not a latent: .*A_latents"):
        Singleres_dataset(classes, resolution=[8, 8, 8])


@pytest.mark.parametrize("resolution", [[32, 32], [0, 32, 32]])
def test_resolution_is_checked(classes, resolution):
    with pytest.raises(UserError, match="three positive numbers"):
        Singleres_dataset(classes, resolution=resolution)


def test_latent_records(classes):
    folder = classes.parent / "A_latents"
    (folder / "latents.json").write_text('{"autoencoder": "abc"}')
    records = Singleres_dataset(classes, resolution=[2, 3, 3]).latent_records
    assert records == {folder: {"autoencoder": "abc"}, classes.parent / "B_latents": None}
    for content in ("{", "[1]"):
        (folder / "latents.json").write_text(content)
        with pytest.raises(UserError, match=r"latents\.json.*make the latents again"):
            read_latent_record(folder)


def test_plain_folder(tmp_path):
    write_volume(tmp_path / "A" / "a.nii.gz", random_volume(0) * 2, AFFINE)
    volume, path = GenerateTrData_dataset(tmp_path / "A", no_norm=True)[0]
    assert torch.equal(volume[0], random_volume(0) * 2)
    assert path == str(tmp_path / "A" / "a.nii.gz")
    data = GenerateTrData_dataset(tmp_path / "A", intensity_range=(-2, 2))
    torch.testing.assert_close(data[0][0][0], random_volume(0), atol=1e-6, rtol=0)
    assert len(data) == 1
    with pytest.raises(UserError, match="outside the declared range"):
        GenerateTrData_dataset(tmp_path / "A")[0]


def test_the_current_folder_has_a_latent_folder_too(tmp_path, monkeypatch):
    (tmp_path / "Knee").mkdir()
    monkeypatch.chdir(tmp_path / "Knee")
    assert latent_folder(".") == tmp_path / "Knee_latents"
    assert latent_folder("../Knee/") == Path("../Knee_latents")
