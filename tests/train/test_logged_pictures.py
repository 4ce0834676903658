"""Pictures of the autoencoder's training are in the patient's directions, whatever augmentation and files do."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.order.random_crops import Turn
from dataset.volumes.geometry import affine_of_orientation, orientation_of
from dataset.volumes.pictures import central_slices
from dataset.volumes.volume_io import read_volume, turned_to_ras, write_volume
from dataset.vqgan import VQGANDataset
from train import callbacks
from train.callbacks import VolumeLogger


def of_place(mm: np.ndarray) -> np.ndarray:
    """A grey value for each place (..., 3) in mm, of which no two directions have the same slope."""
    return (mm @ [0.05, 0.02, 0.007] / 10).clip(-1, 1)


def places(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """mm of each voxel (D, H, W, 3), of an array whose NIfTI axes are x = H, y = W, z = D."""
    z, x, y = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return np.stack([x, y, z], axis=-1) @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("flip_h", [False, True])
@pytest.mark.parametrize("flip_w", [False, True])
@pytest.mark.parametrize("quarter", [False, True])
@pytest.mark.parametrize("size", [(4, 5, 5), (4, 5, 6)])
def test_an_affine_follows_its_voxels(flip_h, flip_w, quarter, size):
    affine = affine_of_orientation("LSA", (1, 2, 3))
    affine[:3, 3] = 7, -3, 2
    data = torch.from_numpy(of_place(places(size, affine)))[None]
    turn = Turn(flip_h, flip_w, quarter)
    turned = turn.apply(data)
    np.testing.assert_allclose(turned[0], of_place(places(size, turn.affine(affine, size))), atol=1e-12)
    assert torch.equal(turned, data) == (not (flip_h or flip_w or (quarter and size[1] == size[2])))


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "ASR", "IRP"])
def test_volumes_are_turned_to_the_directions_of_the_patient(orientation):
    affine = affine_of_orientation(orientation, (1, 2, 3))
    data = torch.from_numpy(of_place(places((4, 5, 6), affine)).astype(np.float32))[None]
    turned, to_mm = turned_to_ras(data, affine)
    assert orientation_of(to_mm) == "RAS"
    assert sorted(turned.shape[1:]) == [4, 5, 6]
    np.testing.assert_allclose(turned[0], of_place(places(turned.shape[1:], to_mm)), atol=1e-6)


def test_a_volume_without_directions_stays_as_it_is():
    data, affine = torch.rand(1, 3, 4, 5), np.diag([1.0, 0.0, 0.0, 1.0])
    turned, to_mm = turned_to_ras(data, affine)
    assert torch.equal(turned, data)
    assert np.array_equal(to_mm, affine)


@pytest.mark.parametrize("orientation", ["RAS", "PSL"])
@pytest.mark.parametrize(("split", "stage"), [("train", 1), ("train", 2), ("val", 1)])
def test_pictures_are_not_of_turned_volumes(tmp_path, monkeypatch, orientation, split, stage):
    """Voxels lie where they lie in the file, and the picture shows right, front and head where it says so."""
    affine = affine_of_orientation(orientation, (2.0, 2.0, 2.0))
    for i in range(2):
        voxels = of_place(places((16, 12, 12), affine)).astype(np.float32)
        write_volume(tmp_path / "box" / f"{i}.nii.gz", voxels, affine)
    (tmp_path / "data.json").write_text('{"box": "box"}')
    options = {"val_fraction": 0.5, "affines": True, "check": False}
    data = VQGANDataset(tmp_path / "data.json", True, split, stage, 8, **options)
    drawn = []
    save = callbacks.save_slice_grid

    def spy(path, rows, **how):
        drawn.append((rows, how))
        return save(path, rows, **how)

    monkeypatch.setattr(callbacks, "save_slice_grid", spy)
    model = SimpleNamespace(
        log_volumes=lambda batch, split: {"inputs": batch["data"], "reconstructions": batch["data"]}
    )
    logger = VolumeLogger(tmp_path / "volumes", 1, SimpleNamespace(submit=lambda write, *args: write(*args)))
    for step in range(12):
        item = data[(step, 0)] if split == "train" else data[0]
        batch = {name: value[None] for name, value in item.items() if name != "path"}
        trainer = SimpleNamespace(is_global_zero=True, global_step=step, loggers=[])
        logger._write(trainer, model, batch, split)
        for name in ("input", "reconstruction"):
            found = read_volume(tmp_path / "volumes" / split / f"step_{step:07d}_{name}.nii.gz")
            assert found.header.orientation == "RAS"
            expected = of_place(places(found.data.shape[1:], found.affine))
            np.testing.assert_allclose(found.data[0], expected, atol=1e-5)
        rows, how = drawn[-1]
        assert how["columns"] == ("axial", "coronal", "sagittal")
        for _, pictures in rows:
            for picture, wanted in zip(pictures, central_slices(found.data).values(), strict=True):
                np.testing.assert_allclose(picture, wanted, atol=1e-5)
