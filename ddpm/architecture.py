"""How BiFlowNet's arguments fit together, and what follows from them for the sizes that it can take."""

import math


def count_flow_levels(widths: list[int]) -> int:
    """F: how many U-Net levels keep the width of the first convolution. widths: that one, then one per level."""
    num_flow = 0
    while num_flow + 1 < len(widths) and widths[num_flow + 1] == widths[0]:
        num_flow += 1
    return num_flow


def count_down_factor(widths: list[int]) -> int:
    """How many times the U-Net makes the grid smaller: levels F-1 … L-2 halve it. widths: as for count_flow_levels."""
    return 2 ** (len(widths) - 1 - count_flow_levels(widths))


def grid_multiple(widths: list[int], sub_volume_size: tuple[int, int, int] = (8, 8, 8)) -> tuple[int, int, int]:
    """What each side of a latent grid (d, h, w) has to be a multiple of: whole sub-volumes, and the U-Net's halvings.

    widths: as for count_flow_levels; [1, *dim_mults] gives the same where the first convolution has the base width.
    """
    return tuple(math.lcm(size, count_down_factor(widths)) for size in sub_volume_size)


def check_arguments(
    dim, widths, attention, sub_volume_size, patch_size, init_kernel_size, resnet_groups, num_heads, needs_classes
) -> None:
    """Report all constructor arguments that do not fit together at once."""
    levels = widths[1:]
    faults = [
        (dim < 12 or dim % 6, f"dim {dim} has to be a multiple of 6, at least 12 (sines and cosines on three axes)"),
        (dim % num_heads, f"dim {dim} has to be divisible by DiT_num_heads {num_heads}"),
        (
            any(width % resnet_groups for width in (dim, *widths)),
            f"the U-Net's widths {sorted({dim, *widths})} have to be divisible by resnet_groups {resnet_groups}",
        ),
        (
            count_flow_levels(widths) == 0,
            f"the first U-Net level ({levels[:1]}) has to be as wide as init_dim {widths[0]}: the two flows meet there",
        ),
        (
            len(attention) != len(levels),
            f"use_sparse_linear_attn has {len(attention)} flags for {len(levels)} levels of dim_mults",
        ),
        (len(sub_volume_size) != 3, f"sub_volume_size {tuple(sub_volume_size)} needs three sizes"),
        (
            any(size % patch_size for size in sub_volume_size),
            f"sub_volume_size {tuple(sub_volume_size)} has to be divisible by patch_size {patch_size}",
        ),
        (init_kernel_size % 2 == 0, f"init_kernel_size {init_kernel_size} has to be odd"),
        (needs_classes, "null_label needs cond_classes"),
    ]
    messages = [message for is_wrong, message in faults if is_wrong]
    if messages:
        raise ValueError(f"BiFlowNet: {'; '.join(messages)}.")
