"""How visible the borders of tiles or patches are in a volume. A pure function, computed in float64."""

from torch import Tensor

from common.errors import UserError


def seam_index(volume: Tensor, edge: int) -> float:
    """Mean absolute difference of neighbouring voxels across tile borders over that of all other neighbours.

    Borders lie at the multiples of `edge` on all three axes; the differences of the axes are pooled. 1 means that
    borders are like everything else. Anatomy moves the index too, so compare it with that of the same volume decoded
    in one pass.

    volume: (D, H, W) or (1, D, H, W). edge: of a tile in voxels.
    Raises UserError for other shapes, NaN, a volume without borders or one that is constant beside them.
    """
    if volume.ndim == 4 and volume.shape[0] == 1:
        volume = volume[0]
    if volume.ndim != 3 or edge < 2 or max(volume.shape) <= edge:
        raise UserError(
            f"seams between tiles of {edge} voxels need a volume (D, H, W) larger than one, got {tuple(volume.shape)}"
        )
    across, elsewhere = [], []
    for axis in range(3):
        steps = volume.double().diff(dim=axis).abs().movedim(axis, 0)  # (extent - 1, ...): step i is from i to i + 1
        is_border = [(i + 1) % edge == 0 for i in range(len(steps))]
        across += [step for step, border in zip(steps, is_border, strict=True) if border]
        elsewhere += [step for step, border in zip(steps, is_border, strict=True) if not border]
    sums = [(sum(step.sum() for step in steps), sum(step.numel() for step in steps)) for steps in (across, elsewhere)]
    border_mean, other_mean = ((total / count).item() for total, count in sums)
    if not border_mean >= 0 or not other_mean > 0:
        raise UserError(f"the volume holds NaN or is constant within tiles of {edge} voxels: no seam index is defined")
    return border_mean / other_mean
