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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from AutoEncoder.model.networks import ATTENTION_HEAD_DIM, ATTENTION_HEADS, Decoder, ImageHead, ResBlock
from AutoEncoder.patches import tile_slices

SMALLEST_BLOCK = 8  # edge in input voxels: smaller ones would be mostly margin
MOST_ELEMENTS = 2**31 - 1  # of a tensor: convolutions count in 32 bits, and are known to fail on larger ones on a GPU
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
    final: ImageHead | None  # after the last stage

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
        return self.final.convolve(_activate(x, affine))

    def margin(self, num_affines: int) -> int:
        """How many input voxels beyond a block `run_with` needs: one output voxel a 3³ convolution, one for `up`."""
        return math.ceil((1 + num_affines) / 2)


@torch.no_grad()
def decode_exactly(decoder: Decoder, z: Tensor, max_bytes: int | None = None) -> Tensor:
    """`decoder(z)`, (B, E, d, h, w) -> (B, image_channels, f·d, f·h, f·w), in at most about `max_bytes`.

    Args:
        decoder: in eval mode.
        z: what the decoder takes, i.e. codebook vectors after `post_vq_conv`.
        max_bytes: memory for activations on z's device, weights not counted; None: no limit.

    Raises:
        ValueError: the smallest blocks need more than `max_bytes`; nothing has been computed then.
    """
    blocks = plan_blocks(decoder, z.shape, activation_bytes(z), max_bytes)
    first = decoder.conv_blocks[0]
    x = first.res2(first.res1(decoder.mid_block(decoder.conv_first(z))))  # (B, w0, d, h, w)
    for stage, block in zip(_stages(decoder), blocks, strict=True):
        x = stage.run(x) if block == tuple(x.shape[2:]) else _run_in_blocks(stage, x, block)
    return x


def _stages(decoder: Decoder) -> list[Stage]:
    levels = list(decoder.conv_blocks)
    return [
        Stage(before.up, (level.res1, level.res2), decoder.final_block if level is levels[-1] else None)
        for before, level in pairwise(levels)
    ]


def _run_in_blocks(stage: Stage, x: Tensor, block: Sequence[int]) -> Tensor:
    """`stage.run(x)`, (B, C, d, h, w) -> (B, C', 2d, 2h, 2w)."""
    affines: list[Affine] = []
    for norm in stage.norms:
        if isinstance(norm, nn.GroupNorm):
            affines.append(_measured_affine(norm, stage, affines, x, block))
        else:  # a batch norm in eval mode
            affines.append(_affine(norm, norm.running_mean[None], norm.running_var[None]))
    out = None
    for target, part in _each_block(stage, affines, x, block):
        if out is None:
            out = part.new_empty(len(x), part.shape[1], *(2 * extent for extent in x.shape[2:]))
        out[(..., *target)] = part
    return out


def _each_block(
    stage: Stage, affines: Sequence[Affine], x: Tensor, block: Sequence[int]
) -> Iterator[tuple[list[slice], Tensor]]:
    """Yields (place in the output, `stage.run_with(affines, x)` there), for blocks that cover all of x.

    Where a block ends inside the volume, the convolutions pad with zeros what should be its neighbours: that is wrong
    in the margin, which is cut off. Where the volume ends, the block ends with it, and zeros are right.
    """
    margin = stage.margin(len(affines))
    for tile in tile_slices(x.shape[2:], block):
        extents = zip(tile, x.shape[2:], strict=True)
        wide = [slice(max(0, t.start - margin), min(extent, t.stop + margin)) for t, extent in extents]
        part = stage.run_with(affines, x[(..., *wide)])
        inner = [slice(2 * (t.start - w.start), 2 * (t.stop - w.start)) for t, w in zip(tile, wide, strict=True)]
        yield [slice(2 * t.start, 2 * t.stop) for t in tile], part[(..., *inner)]


# --------------------------------------------------------------------------------------------------- normalisation


def _activate(x: Tensor, affine: Affine) -> Tensor:
    """SiLU of the normalised x, in the norm's own precision as under autocast."""
    return F.silu(torch.addcmul(affine.shift, x.to(affine.scale.dtype), affine.scale), inplace=True)


def _measured_affine(
    norm: nn.GroupNorm, stage: Stage, affines: Sequence[Affine], x: Tensor, block: Sequence[int]
) -> Affine:
    """The norm with the statistics of its whole input, put together block by block (Chan et al. 1979, eq. 2.1)."""
    count, mean, squares = 0, 0.0, 0.0  # of elements; (B, G); (B, G), the sum of squared deviations
    for _, part in _each_block(stage, affines, x, block):
        groups = rearrange(part, "b (g c) d h w -> b g (c d h w)", g=norm.num_groups)
        moments = torch.var_mean(groups.to(norm.weight.dtype), dim=-1, correction=0)
        variance, own_mean = (value.double() for value in moments)  # (B, G)
        own = groups.shape[-1]
        delta = own_mean - mean
        squares = squares + variance * own + delta.square() * (count * own / (count + own))
        count += own
        mean = mean + delta * (own / count)
    repeats = norm.num_channels // norm.num_groups
    return _affine(norm, *(value.repeat_interleave(repeats, dim=1) for value in (mean, squares / count)))


def _affine(norm: nn.Module, mean: Tensor, variance: Tensor) -> Affine:
    """mean, variance: (B or 1, C)."""
    scale = norm.weight / torch.sqrt(variance + norm.eps)  # (B, C)
    shift = norm.bias - mean * scale
    return Affine(*(value[..., None, None, None].to(norm.weight.dtype) for value in (scale, shift)))


# ---------------------------------------------------------------------------------------------------------- memory


def plan_blocks(
    decoder: Decoder, shape: Sequence[int], element_bytes: int, max_bytes: int | None
) -> list[tuple[int, ...]]:
    """The largest blocks (input voxels) of each stage with which latents of `shape` (B, E, d, h, w) can be decoded.

    A block as large as the stage's grid means one pass; no tensor of a block has more than `MOST_ELEMENTS`.
    element_bytes: of the convolutions' results.

    Raises:
        ValueError: even the smallest blocks need more than `max_bytes`.
    """
    batch, _, *grid = shape
    limit = math.inf if max_bytes is None else max_bytes
    stages = _stages(decoder)
    grids = [tuple(extent * 2**i for extent in grid) for i in range(len(stages))]
    plans = [list(_candidates(*pair, batch, element_bytes)) for pair in zip(stages, grids, strict=True)]
    needed = max(_latent_grid_bytes(decoder, batch, grid), *(min(plan)[0] for plan in plans))
    if needed > limit:
        raise ValueError(
            f"decoding latents of {tuple(grid)} needs {needed / 1e9:.2g} GB even in the smallest blocks, "
            f"{limit / 1e9:.2g} GB are allowed"
        )
    return [next(block for bytes_needed, block in plan if bytes_needed <= limit) for plan in plans]


def activation_bytes(z: Tensor) -> int:
    """Bytes an element of what convolutions give for z, under autocast too."""
    device = z.device.type
    return (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else z.dtype).itemsize


def _candidates(
    stage: Stage, grid: tuple[int, ...], batch: int, element_bytes: int
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """(bytes that the stage needs, block), from the whole grid or what tensors can hold on, its longest edge halved."""
    margin = stage.margin(len(stage.norms))
    wide, narrow = stage.blocks[0].conv1.in_channels, stage.blocks[0].conv1.out_channels
    out_channels = narrow if stage.final is None else stage.final[-1].out_channels
    out_bytes = element_bytes if stage.final is None else 4  # an image is float32
    stored = batch * math.prod(grid) * (stage.up.conv_trans.in_channels * element_bytes + 8 * out_channels * out_bytes)
    # At their peak, in the first convolution: its input, the normalised input, both again as the convolution wants them
    # laid out, and its output, twice. The normalised input is float32, and in half precision is converted besides.
    copies = 2 if element_bytes >= 4 else 3
    voxel_bytes = wide * (copies * element_bytes + 4) + 2 * narrow * element_bytes
    block = grid
    while True:
        voxels = 8 * math.prod(min(b + 2 * margin, extent) for b, extent in zip(block, grid, strict=True))
        longest = max(range(3), key=lambda axis: block[axis])
        is_smallest = block[longest] <= SMALLEST_BLOCK
        if is_smallest or batch * voxels * max(wide, narrow) <= MOST_ELEMENTS:
            yield SAFETY * (stored + batch * voxels * voxel_bytes), block
        if is_smallest:
            return
        block = tuple(math.ceil(b / 2) if axis == longest else b for axis, b in enumerate(block))


def _latent_grid_bytes(decoder: Decoder, batch: int, grid: Sequence[int]) -> float:
    """Of the attention: its input, normed and as tokens; queries, keys and values, twice; the result; in float32."""
    width, inner = decoder.conv_first.out_channels, ATTENTION_HEADS * ATTENTION_HEAD_DIM
    return SAFETY * 4 * batch * math.prod(grid) * (3 * width + 7 * inner)
