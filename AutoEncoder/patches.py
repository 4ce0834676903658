"""Volume <-> patches and latent <-> tiles: the only place that knows how a volume is cut (paper, section III-A).

Axes: B batch, C channels, (D, H, W) voxels with D = z, H = x, W = y; p patch edge; (gd, gh, gw) the grid of patches.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

BACKGROUND = -1.0  # air, the smallest value of the model's intensity range


def padded_size(size: Sequence[int], multiple: int) -> tuple[int, ...]:
    """The smallest size, axis by axis, that is at least `size` and divides by `multiple`."""
    return tuple(-(-extent // multiple) * multiple for extent in size)


def pad_to_multiple(volume: Tensor, multiple: int, value: float = BACKGROUND) -> Tensor:
    """Append background at the far end of each axis until it divides by `multiple`.

    (B, C, D, H, W) -> (B, C, D', H', W'). Returns `volume` itself when nothing is missing; `crop_to` undoes it.
    """
    d, h, w = volume.shape[-3:]
    target_d, target_h, target_w = padded_size((d, h, w), multiple)
    if (target_d, target_h, target_w) == (d, h, w):
        return volume
    return F.pad(volume, (0, target_w - w, 0, target_h - h, 0, target_d - d), value=value)


def crop_to(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Keep the first `size` = (D, H, W) voxels of (B, C, D', H', W')."""
    d, h, w = size
    return volume[..., :d, :h, :w]


def split_patches(volume: Tensor, patch_size: int) -> Tensor:
    """(B, C, gd·p, gh·p, gw·p) -> (B·gd·gh·gw, C, p, p, p), patches of one volume in z, x, y order.

    Raises:
        ValueError: an extent does not divide by `patch_size` (pad with `pad_to_multiple` first).
    """
    if any(extent % patch_size for extent in volume.shape[-3:]):
        raise ValueError(
            f"a volume of {tuple(volume.shape[-3:])} voxels does not divide into patches of {patch_size}: "
            f"pad it to {padded_size(volume.shape[-3:], patch_size)} first"
        )
    p = patch_size
    return rearrange(volume, "b c (gd p1) (gh p2) (gw p3) -> (b gd gh gw) c p1 p2 p3", p1=p, p2=p, p3=p)


def stitch_patches(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """(B·gd·gh·gw, C, p, p, p) -> (B, C, gd·p, gh·p, gw·p): the inverse of `split_patches` for any patch edge."""
    gd, gh, gw = grid
    return rearrange(patches, "(b gd gh gw) c p1 p2 p3 -> b c (gd p1) (gh p2) (gw p3)", gd=gd, gh=gh, gw=gw)


def tile_slices(size: Sequence[int], tile: int | Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Tiles (smaller at the far ends) that cover a grid of `size` without overlap, in z, x, y order.

    tile: the edge of all three axes, or one for each.
    """
    edges = (tile,) * len(size) if isinstance(tile, int) else tile
    axes = [
        [slice(start, min(start + edge, extent)) for start in range(0, extent, edge)]
        for extent, edge in zip(size, edges, strict=True)
    ]
    yield from product(*axes)
