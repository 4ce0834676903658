"""Volumes <-> patches <-> tiles."""

import pytest
import torch

from AutoEncoder.patches import crop_to, pad_to_multiple, split_patches, stitch_patches, tile_slices


@pytest.mark.parametrize(("size", "patch"), [((8, 4, 12), 4), ((4, 4, 4), 4), ((2, 6, 4), 2)])
def test_stitching_undoes_splitting(size, patch):
    volume = torch.randn(2, 3, *size)
    patches = split_patches(volume, patch)
    grid = [extent // patch for extent in size]
    assert patches.shape == (2 * grid[0] * grid[1] * grid[2], 3, patch, patch, patch)
    torch.testing.assert_close(stitch_patches(patches, grid), volume, rtol=0, atol=0)


def test_patches_come_in_z_x_y_order():
    volume = torch.arange(2 * 2 * 2.0).reshape(1, 1, 2, 2, 2)  # voxel value = its place in z, x, y order
    assert split_patches(volume, 1).flatten().tolist() == list(range(8))


@pytest.mark.parametrize(("size", "padded"), [((5, 8, 9), (8, 8, 12)), ((4, 4, 4), (4, 4, 4)), ((1, 2, 3), (4, 4, 4))])
def test_padding_appends_background_and_is_cropped_back(size, padded):
    volume = torch.rand(1, 1, *size)
    result = pad_to_multiple(volume, 4)
    assert result.shape[-3:] == padded
    torch.testing.assert_close(crop_to(result, size), volume, rtol=0, atol=0)
    added = result.numel() - volume.numel()
    assert result.sum().item() == pytest.approx(volume.sum().item() - added, abs=1e-3)


def test_splitting_never_cuts_silently():
    with pytest.raises(ValueError, match=r"\(5, 4, 4\) voxels .* patches of 4: pad it to \(8, 4, 4\)"):
        split_patches(torch.zeros(1, 1, 5, 4, 4), 4)


def test_tiles_cover_every_voxel_once():
    covered = torch.zeros(5, 4, 7)
    for tile in tile_slices((5, 4, 7), 3):
        covered[tile] += 1
    assert covered.eq(1).all()
