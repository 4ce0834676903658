"""The 3D ResNets of Med3D (Chen et al., arXiv 1904.00625), without a head. B batch, F features, D, H, W voxels."""

import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS_PER_STAGE = {10: (1, 1, 1, 1), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
WIDTHS = (64, 128, 256, 512)
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)  # instead of further strides, so that features keep 1/8 of the resolution


def conv3(in_width: int, width: int, stride: int = 1, dilation: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3³ convolutions and a shortcut (ResNet-10)."""

    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3(in_width, width, stride, dilation)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = conv3(width, width, dilation=dilation)
        self.bn2 = nn.BatchNorm3d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1³, 3³ and 1³ convolutions, four times as wide at the end, and a shortcut (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_width, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = conv3(width, width, stride, dilation)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(width * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class MedicalNetResNet(nn.Module):
    """(B, 1, D, H, W), z-scored -> features (B, F, D/8, H/8, W/8), F = 512 (depth 10) or 2048.

    Args:
        depth: 10, 50, 101, 152 or 200.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        if depth not in BLOCKS_PER_STAGE:
            raise ValueError(f"MedicalNet has ResNets of depth {sorted(BLOCKS_PER_STAGE)}, got {depth}")
        block = BasicBlock if depth == 10 else Bottleneck
        self.conv1 = nn.Conv3d(1, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        in_width = 64
        stages = zip(BLOCKS_PER_STAGE[depth], WIDTHS, STRIDES, DILATIONS, strict=True)
        for i, (num_blocks, width, stride, dilation) in enumerate(stages, start=1):
            self.add_module(f"layer{i}", make_stage(block, num_blocks, in_width, width, stride, dilation))
            in_width = width * block.expansion

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # (B, 64, D/4, H/4, W/4)
        x = self.layer1(x)  # (B, F/8, D/4, H/4, W/4)
        x = self.layer2(x)  # (B, F/4, D/8, H/8, W/8)
        x = self.layer3(x)  # (B, F/2, D/8, H/8, W/8)
        return self.layer4(x)  # (B, F, D/8, H/8, W/8)


def make_stage(
    block: type[BasicBlock] | type[Bottleneck], num_blocks: int, in_width: int, width: int, stride: int, dilation: int
) -> nn.Sequential:
    """`num_blocks` blocks, the first with the stride and, where the shape changes, a convolution on its shortcut."""
    out_width = width * block.expansion
    downsample = None
    if stride != 1 or in_width != out_width:
        downsample = nn.Sequential(
            nn.Conv3d(in_width, out_width, 1, stride=stride, bias=False), nn.BatchNorm3d(out_width)
        )
    first = block(in_width, width, stride, dilation, downsample)
    return nn.Sequential(first, *(block(out_width, width, 1, dilation, None) for _ in range(num_blocks - 1)))
