"""Decoding a whole volume block by block in bounded memory, with the result of one pass.

Only two parts of the decoder see more than a neighbourhood: the attention of its middle block, on the small latent
grid, and the statistics of its group norms. So everything on the latent grid runs in one pass. After that, each stage
(an upsampling and the residual blocks of its resolution) runs on blocks of its input, each with a margin as wide as
its convolutions reach, once for each group norm to collect that norm's statistics over the whole volume, and once more
for the result. Equal to one pass but for the order in which floats are summed.

Peak memory: a stage's whole input and output, and what one block needs. The price is that the first convolutions of a
stage are computed as often as it has norms, about four times the work of one pass where all stages run in blocks.
Stages that fit as a whole run as they do in one pass.

Axes: B batch, C channels, G groups, (d, h, w) a stage's input grid; its output grid is (2d, 2h, 2w).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from AutoEncoder.model.networks import ATTENTION_HEAD_DIM, ATTENTION_HEADS, Decoder, ResBlock
from AutoEncoder.patches import tile_slices

SMALLEST_BLOCK = 8  # edge in input voxels: smaller ones would be mostly margin
SAFETY = 1.25  # measured peaks were up to 1.16 times what is counted here: allocators, workspaces of convolutions


class Affine(NamedTuple):
    """A normalisation with known statistics, x·scale + shift; both (B or 1, C, 1, 1, 1)."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Stage:
    """The part of the decoder at one resolution above that of the latent."""

    up: nn.Module
    blocks: tuple[ResBlock, ResBlock]
    final: nn.Sequential | None  # norm, SiLU, convolution: after the last stage

    @property
    def norms(self) -> list[nn.Module]:
        """All norms in the order in which they are applied."""
        norms = [norm for block in self.blocks for norm in (block.norm1, block.norm2)]
        return norms if self.final is None else [*norms, self.final[0]]

    def run(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> (B, C', 2d, 2h, 2w), with norms that take their statistics from this very input."""
        x = self.up(x)
        for block in self.blocks:
            x = block(x)
        return x if self.final is None else self.final(x)

    def run_with(self, affines: Sequence[Affine], x: Tensor) -> Tensor:
        """As `run`, but normalises with `affines`. With fewer of them than norms: the input of the next norm."""
        remaining = iter(affines)
        x = self.up(x)
        for block in self.blocks:
            if (affine := next(remaining, None)) is None:
                return x
            h = block.conv1(_activate(x, affine))
            if (affine := next(remaining, None)) is None:
                return h
            h = block.conv2(_activate(h, affine))
            x = h.add_(block.shortcut(x))
        if self.final is None or (affine := next(remaining, None)) is None:
            return x
        return self.final[-1](_activate(x, affine))

    def margin(self, num_affines: int) -> int:
        """How many input voxels beyond a block `run_with` needs: one output voxel a 3³ convolution, one for `up`."""
        return math.ceil((1 + num_affines) / 2)

    @property
    def widths(self) -> tuple[int, int]:
        """Channels before and after the first residual block."""
        return self.blocks[0].conv1.in_channels, self.blocks[0].conv1.out_channels


@torch.no_grad()
def decode_exactly(decoder: Decoder, z: Tensor, max_bytes: int | None = None) -> Tensor:
    """`decoder(z)`, (B, E, d, h, w) -> (B, image_channels, f·d, f·h, f·w), in at most about `max_bytes`.

    Args:
        decoder: in eval mode.
        z: what the decoder takes, i.e. codebook vectors after `post_vq_conv`.
        max_bytes: memory for activations on z's device, weights not counted; None: everything in one pass.

    Raises:
        ValueError: the smallest blocks need more than `max_bytes`.
    """
    limit = math.inf if max_bytes is None else max_bytes
    needed = _latent_grid_bytes(decoder, z)
    if needed > limit:
        raise _too_little(z, needed, limit)
    first, *others = decoder.conv_blocks
    x = first.res2(first.res1(decoder.mid_block(decoder.conv_first(z))))  # (B, w0, d, h, w)
    up = first.up
    for level in others:
        is_last = level is others[-1]
        stage = Stage(up, (level.res1, level.res2), decoder.final_block if is_last else None)
        x = _run_stage(stage, x, limit, z)
        up = None if is_last else level.up
    return x


def _run_stage(stage: Stage, x: Tensor, limit: float, z: Tensor) -> Tensor:
    """(B, C, d, h, w) -> (B, C', 2d, 2h, 2w), in the largest blocks that fit."""
    block = _choose_block(stage, x, limit, z)
    if block == tuple(x.shape[2:]):
        return stage.run(x.to(z.device))
    affines: list[Affine] = []
    for norm in stage.norms:
        affines.append(_known_affine(norm) or _measured_affine(norm, stage, affines, x, block, z.device))
    out = None
    for target, part in _each_block(stage, affines, x, block, z.device):
        if out is None:
            size = [2 * extent for extent in x.shape[2:]]
            out = torch.empty(len(x), part.shape[1], *size, dtype=part.dtype, device=x.device)
        out[(..., *target)] = part
    return out


def _each_block(stage: Stage, affines: Sequence[Affine], x: Tensor, block: Sequence[int], device: torch.device):
    """Yields (place in the output, `stage.run_with(affines, x)` there), for blocks that cover all of x.

    Where a block ends inside the volume, the convolutions pad with zeros what should be its neighbours: that is wrong
    in the margin, which is cut off. Where the volume ends, the block ends with it, and zeros are right.
    """
    margin = stage.margin(len(affines))
    for tile in tile_slices(x.shape[2:], block):
        extents = zip(tile, x.shape[2:], strict=True)
        wide = [slice(max(0, t.start - margin), min(extent, t.stop + margin)) for t, extent in extents]
        part = stage.run_with(affines, x[(..., *wide)].to(device))
        inner = [slice(2 * (t.start - w.start), 2 * (t.stop - w.start)) for t, w in zip(tile, wide, strict=True)]
        yield [slice(2 * t.start, 2 * t.stop) for t in tile], part[(..., *inner)]


# --------------------------------------------------------------------------------------------------- normalisation


def _activate(x: Tensor, affine: Affine) -> Tensor:
    """SiLU of the normalised x, in the norm's own precision as under autocast."""
    return F.silu(torch.addcmul(affine.shift, x.to(affine.scale.dtype), affine.scale), inplace=True)


def _known_affine(norm: nn.Module) -> Affine | None:
    """What a batch norm does in eval mode; None for a group norm, which has to see its input first."""
    if isinstance(norm, nn.GroupNorm):
        return None
    return _affine(norm, norm.running_mean[None], norm.running_var[None])


def _measured_affine(
    norm: nn.GroupNorm, stage: Stage, affines: Sequence[Affine], x: Tensor, block: Sequence[int], device: torch.device
) -> Affine:
    """The norm with the statistics of its whole input, put together block by block (Chan et al. 1979, eq. 2.1)."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())  # of elements; (B, G); (B, G) sum of squared deviations
    for _, part in _each_block(stage, affines, x, block, device):
        groups = rearrange(part, "b (g c) d h w -> b g (c d h w)", g=norm.num_groups)
        moments = torch.var_mean(groups.to(norm.weight.dtype), dim=-1, correction=0)
        variance, own_mean = (value.double() for value in moments)  # (B, G)
        own = groups.shape[-1]
        delta = own_mean - mean.to(own_mean)
        squares = squares.to(own_mean) + variance * own + delta.square() * (count * own / (count + own))
        count += own
        mean = mean.to(own_mean) + delta * (own / count)
    repeats = norm.num_channels // norm.num_groups
    return _affine(norm, *(value.repeat_interleave(repeats, dim=1) for value in (mean, squares / count)))


def _affine(norm: nn.Module, mean: Tensor, variance: Tensor) -> Affine:
    """mean, variance: (B or 1, C)."""
    scale = norm.weight / torch.sqrt(variance + norm.eps)  # (B, C)
    shift = norm.bias - mean * scale
    return Affine(*(value[..., None, None, None].to(norm.weight.dtype) for value in (scale, shift)))


# ---------------------------------------------------------------------------------------------------------- memory


def _choose_block(stage: Stage, x: Tensor, limit: float, z: Tensor) -> tuple[int, ...]:
    """The largest blocks (input voxels) with which the stage fits: the longest edge is halved until it does."""
    grid, margin = tuple(x.shape[2:]), stage.margin(len(stage.norms))
    block = grid
    stored = (x.numel() + 8 * math.prod(grid) * len(x) * _out_channels(stage)) * x.element_size()
    while True:
        voxels = 8 * math.prod(min(b + 2 * margin, extent) for b, extent in zip(block, grid, strict=True))
        needed = SAFETY * (stored + len(x) * voxels * _bytes_per_voxel(stage, x.element_size()))
        if needed <= limit:
            return block
        longest = max(range(3), key=lambda axis: block[axis])
        if block[longest] <= SMALLEST_BLOCK:
            raise _too_little(z, needed, limit)
        block = tuple(math.ceil(b / 2) if axis == longest else b for axis, b in enumerate(block))


def _out_channels(stage: Stage) -> int:
    return stage.widths[1] if stage.final is None else stage.final[-1].out_channels


def _bytes_per_voxel(stage: Stage, size: int) -> int:
    """Of activations at their peak, the first convolution: its input, normalised input, both again as the convolution
    wants them laid out, and its output; `size` bytes an element but for the normalised input, which is float32."""
    wide, narrow = stage.widths
    return wide * (2 * size + 4) + 2 * narrow * size


def _latent_grid_bytes(decoder: Decoder, z: Tensor) -> int:
    """Of the attention: its input, normed and as tokens; queries, keys and values, twice; the result; in float32."""
    width, inner = decoder.conv_first.out_channels, ATTENTION_HEADS * ATTENTION_HEAD_DIM
    return int(SAFETY * 4 * len(z) * math.prod(z.shape[2:]) * (3 * width + 7 * inner))


def _too_little(z: Tensor, needed: float, limit: float) -> ValueError:
    return ValueError(
        f"decoding latents of {tuple(z.shape[2:])} needs {needed / 1e9:.2g} GB even in the smallest blocks, "
        f"{limit / 1e9:.2g} GB are allowed"
    )
