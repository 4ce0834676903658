"""Hints of a ControlNet: shares of labels on the latent grid, what fits a latent and what doesn't."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataset.cache.latents import LatentCache
from dataset.Control_dataset import Control_dataset
from dataset.hints import LatentHint, MaskHint, hints_of
from dataset.volumes.geometry import centred_affine
from dataset.volumes.index import read_hint_folders
from dataset.volumes.volume_io import write_latent, write_volume

GRID = (2, 2, 4)
TWO = MaskHint("organs", (("liver", 1), ("tumour", 5)))


def write_mask(path: Path, labels: torch.Tensor, shift: float = 0.0) -> Path:
    affine = centred_affine((1.0, 1.0, 1.0), labels.shape)
    affine[0, 3] += shift
    write_volume(path, labels[None].float(), affine)
    return path


def test_small_structures_keep_their_share(tmp_path):
    labels = torch.zeros(8, 8, 16)
    labels[0, 0, 0] = 5  # a single voxel, which the nearest one would lose
    labels[4:, :, 8:] = 1
    found = TWO.read(write_mask(tmp_path / "m.nii.gz", labels), GRID)
    assert found.shape == (2, *GRID)
    assert found[1, 0, 0, 0] == 1 / 64
    assert found[0, 1, :, 2:].eq(1).all()
    assert found.sum() == 4 + 1 / 64


def test_a_mask_is_padded_as_its_volume(tmp_path):
    labels = torch.ones(6, 8, 16)
    found = TWO.read(write_mask(tmp_path / "m.nii.gz", labels), GRID)
    assert found[0, 1].unique().tolist() == [0.5]


def test_bits_of_many_labels(tmp_path):
    hint = MaskHint("all", (("a", 1), ("b", 2), ("c", 7)), bits=True)
    assert hint.channels == 3
    labels = torch.full((8, 8, 16), 2.0)
    labels[:4] = 7
    found = hint.read(write_mask(tmp_path / "m.nii.gz", labels), GRID)
    assert found[:, 0].unique(dim=1).unique().tolist() == [1.0]
    assert [found[bit, 1].unique().tolist() for bit in range(3)] == [[0.0], [1.0], [0.0]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((8, 8, 16), 3.0), r"label 3 is not among those of hint organs \(liver 1, tumour 5\): list it"),
        (torch.zeros(8, 8, 16), "an empty mask"),
        (torch.ones(64, 8, 16), "which do not lie on the latent grid 2x2x4"),
    ],
)
def test_masks_that_say_nothing_or_too_much(tmp_path, labels, message):
    path = write_mask(tmp_path / "m.nii.gz", labels)
    with pytest.raises(ValueError, match=message):
        TWO.read(path, GRID)


def test_hints_of_a_configuration():
    rows = [
        {"name": "fbp", "kind": "image", "labels": {}, "bits": False, "channels": None},
        {"name": "m", "kind": "mask", "labels": {"tumour": 2, "liver": 1}, "bits": False, "channels": None},
        {"name": "age", "kind": "latent", "labels": {}, "bits": False, "channels": 1},
    ]
    image, mask, latent = hints_of(rows, 8)
    assert (image.channels, image.is_image, mask.values, latent.channels, latent.is_image) == (
        8,
        True,
        [1, 2],
        1,
        False,
    )


# ------------------------------------------------------------------------------------------------------------- data set


@pytest.fixture
def data(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        name = f"sub/{index}.nii.gz"
        for folder in ("x_latents", "fbp_latents"):
            write_latent(tmp_path / folder / name, torch.rand((4, *GRID), generator=generator))
        labels = torch.zeros(8, 8, 16)
        labels[index, :4] = 1
        for folder in ("x", "fbp", "masks"):
            write_mask(tmp_path / folder / name, labels)
    hints = {"fbp": "fbp_latents", "organs": "masks"}
    (tmp_path / "control.json").write_text(json.dumps({"0": {"images": "x_latents", "hints": hints}}))
    return tmp_path / "control.json"


HINTS = [LatentHint("fbp", 4, True), MaskHint("organs", (("liver", 1),))]


@pytest.mark.parametrize("is_cached", [False, True])
def test_items_have_their_hints_behind_the_latent(data, tmp_path, is_cached):
    dataset = Control_dataset(data, hints=HINTS, cache=LatentCache() if is_cached else None)
    if is_cached:
        dataset.build_cache(0, __import__("logging").getLogger("test"))
    item, label, res = dataset[1]
    assert item.shape == (9, *GRID)
    assert (label.item(), res.tolist()) == (0, [2 / 64, 2 / 64, 4 / 64])
    for channels, folder in ((slice(4), "x_latents"), (slice(4, 8), "fbp_latents")):
        from dataset.volumes.volume_io import read_latent

        assert torch.equal(item[channels], read_latent(tmp_path / folder / "sub/1.nii.gz"))
    assert item[8, 0, 0].tolist() == [0.25] * 4
    assert item[8].sum() == 1.0


def test_folders_of_hints(data, tmp_path):
    found, pairs_only = read_hint_folders(data)
    assert not pairs_only
    assert {name: path.name for name, path in found[data.parent / "x_latents"].items()} == {
        "fbp": "fbp_latents",
        "organs": "masks",
    }


def test_latents_without_a_hint_are_left_out_where_pairs_alone_are_wanted(data, caplog):
    entries = json.loads(data.read_text())
    data.write_text(json.dumps({"0": {**entries["0"], "pairs_only": True}}))
    (data.parent / "masks/sub/0.nii.gz").unlink()
    with caplog.at_level("INFO"):
        dataset = Control_dataset(data, hints=HINTS)
    assert [file.name for file in dataset.files] == ["1.nii.gz", "2.nii.gz"]
    assert len(dataset.labels) == 2
    assert "1 of 3 latents have no hint" in caplog.text
    nobody = SimpleNamespace(select=lambda folder, side: [])  # a split whose validation side is empty
    assert len(Control_dataset(data, hints=HINTS, split=nobody, side="validation")) == 0
    for index in (1, 2):
        (data.parent / f"fbp_latents/sub/{index}.nii.gz").unlink()
    with pytest.raises(ValueError, match="no latent has its hints"):
        Control_dataset(data, hints=HINTS)


def moved(data: Path) -> None:
    labels = torch.ones(8, 8, 16)
    write_mask(data.parent / "masks/sub/2.nii.gz", labels, shift=3.0)


def other_grid(data: Path) -> None:
    write_latent(data.parent / "fbp_latents/sub/2.nii.gz", torch.rand(4, 4, 2, 4))


def other_autoencoder(data: Path) -> None:
    for folder, checkpoint in (("x_latents", "a"), ("fbp_latents", "b")):
        record = {"autoencoder": f"sha of {checkpoint}", "checkpoint": f"{checkpoint}.ckpt"}
        (data.parent / folder / "latents.json").write_text(json.dumps(record))


def plain_json(data: Path) -> None:
    data.write_text('{"0": "x_latents"}')


def other_names(data: Path) -> None:
    data.write_text('{"0": {"images": "x_latents", "hints": {"zf": "fbp_latents"}}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: (data.parent / "masks/sub/0.nii.gz").unlink(), "1 of 3 hints organs are missing, this one of"),
        (moved, "masks/sub/2.nii.gz: not on the grid of .* mm away"),
        (other_grid, "hint fbp has 4 channels on the grid 4x2x4, 4 on 2x2x4 are needed"),
        (other_autoencoder, r"hint fbp is of another autoencoder .b.ckpt. than the latents in .*x_latents .a.ckpt."),
        (plain_json, '"0" must be {"images": folder, "hints"'),
        (other_names, "has no hints fbp: name their folder"),
    ],
)
def test_hints_that_do_not_belong(data, change, message):
    change(data)
    with pytest.raises(ValueError, match=message):
        Control_dataset(data, hints=HINTS)
