"""Blocks of BiFlowNet: the transformer parts of the intra-patch flow, the convolutional parts of the inter-patch flow.

Letters: B batch, C channels, d h w grid; N sub-volumes of a latent, T tokens of a sub-volume, K width of the condition.
Attribute names are those of the published checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from common.convolution import Conv3d, ConvTranspose3d

MAX_PERIOD = 10000.0  # of the sinusoids, as in the original transformer
HEAD_DIM = 32  # channels per head of the U-Net's attention
ALIGNMENT_BYTES = 16  # fused kernels on a GPU take heads whose width is a multiple of it, vector units like it too

# -------------------------------------------------------------------------------------------------------- embeddings


class SinusoidalEmbedding(nn.Module):
    """Timesteps (B,) as (B, dim): sines, then cosines, of dim / 2 frequencies in geometric steps from 1 to 1/10000."""

    def __init__(self, dim: int):
        super().__init__()
        self.half = dim // 2

    def forward(self, time: Tensor) -> Tensor:
        steps = torch.arange(self.half, device=time.device)
        frequencies = torch.exp(steps * (-math.log(MAX_PERIOD) / (self.half - 1)))  # (dim/2)
        angles = time[:, None].float() * frequencies[None, :]  # (B, dim/2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (B, dim)


def sincos_position_embedding(dim: int, grid: tuple[int, int, int]) -> Tensor:
    """Fixed embedding of the positions of a token grid, (d·h·w, dim): per axis dim / 3 channels, sines then cosines."""
    frequencies = MAX_PERIOD ** (-torch.arange(dim // 6, dtype=torch.float64) / (dim // 6))  # (dim/6)
    positions = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))  # (d·h·w, 3)
    angles = positions[..., None] * frequencies  # (d·h·w, 3, dim/6)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).float()  # (d·h·w, dim)


class CubeConv3d(nn.Conv3d):
    """A convolution whose kernel and stride are one cube, (B, C, D, H, W) -> (B, C', D/p, H/p, W/p).

    Computed as a product of matrices, which stays in float32 where a GPU convolves in TF32 (`configure_backend`).
    """

    def forward(self, x: Tensor) -> Tensor:
        (p, _, _), (d, h, w) = self.kernel_size, (extent // self.kernel_size[0] for extent in x.shape[2:])
        cubes = rearrange(x, "b c (d p0) (h p1) (w p2) -> b (d h w) (c p0 p1 p2)", p0=p, p1=p, p2=p)
        products = F.linear(cubes, self.weight.flatten(1), self.bias)  # (B, D/p·H/p·W/p, C')
        return rearrange(products, "b (d h w) c -> b c d h w", d=d, h=h, w=w)


class PatchEmbed_Voxel(nn.Module):
    """Cubes of a sub-volume as tokens: (B, C, D, H, W) to (B, T, embed_dim), T in d, h, w order.

    Args:
        voxel_size: (D, H, W) of the sub-volume, or one number for a cube.
        patch_size: edge of the cube that becomes a token.
    """

    def __init__(self, voxel_size=8, patch_size=2, in_chans=3, embed_dim=768, bias=True):
        super().__init__()
        self.voxel_size = (voxel_size,) * 3 if isinstance(voxel_size, int) else tuple(voxel_size)
        if any(size % patch_size for size in self.voxel_size):
            raise ValueError(
                f"sub-volume {self.voxel_size} does not divide into patches of {patch_size}: change either."
            )
        self.patch_size = patch_size
        self.grid_size = tuple(size // patch_size for size in self.voxel_size)
        self.num_patches = math.prod(self.grid_size)
        self.proj = CubeConv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.voxel_size:
            raise ValueError(f"sub-volume is {tuple(x.shape[2:])}, this embedding was built for {self.voxel_size}.")
        # In float32 even under autocast: half precision would round away the signal in a very noisy latent.
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = self.proj(x.float())  # (B, embed_dim, D/p, H/p, W/p)
        return rearrange(x, "b c d h w -> b (d h w) c")


# -------------------------------------------------------------------------------------------------- intra-patch flow


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens (B, N, T, C) with one modulation per sample (B, C), the same for all its sub-volumes."""
    return x * (1 + scale[:, None, None, :]) + shift[:, None, None, :]


class PatchAttention(nn.Module):
    """Multi-head self-attention among the tokens of a sub-volume, (B·N, T, C) to the same shape.

    As `timm.layers.Attention` with biases, names of the parameters included, but for the padding of `attend`.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B·N, T, 3, heads, C/heads)
        return self.proj(attend(qkv).flatten(2))  # (B·N, T, C)


def attend(qkv: Tensor) -> Tensor:
    """Attention of queries, keys and values in one tensor (B, T, 3, heads, E), giving (B, T, heads, E).

    Heads are filled up with zeros to a multiple of 16 bytes: those of the paper have 9 channels, for which a GPU takes
    its slowest kernel and a CPU nearly twice the time. Zeros add nothing to the products of queries and keys, whose
    scale stays that of E, and the values' zeros come out as zeros, which are cut off: nothing but rounding changes.
    """
    width = qkv.shape[-1]
    padding = -width % (ALIGNMENT_BYTES // qkv.element_size())
    q, k, v = F.pad(qkv, (0, padding)).permute(2, 0, 3, 1, 4)  # (B, heads, T, E + padding) each
    x = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(width))
    return x[..., :width].transpose(1, 2)  # (B, T, heads, E)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero (Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023).

    Tokens attend within their own sub-volume only; the condition is shared by all sub-volumes of a sample. The MLP is
    dim·mlp_ratio wide. With ``skip``, the output of an earlier block is merged by a Linear layer (U-ViT style).

    Shapes: x, skip and the result (B, N, T, C = dim); condition (B, K = cond_dim).
    """

    def __init__(self, dim: int, num_heads: int, cond_dim: int, mlp_ratio: float = 4.0, skip: bool = False):
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = PatchAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))  # (B, N, T, C)
        modulation = self.adaLN_modulation(condition).chunk(6, dim=-1)  # 6 × (B, C), once per sample
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn[:, None, None, :] * self._attend(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None, None, :] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def _attend(self, x: Tensor) -> Tensor:
        tokens = self.attn(rearrange(x, "b n t c -> (b n) t c"))  # (B·N, T, C)
        return rearrange(tokens, "(b n) t c -> b n t c", b=len(x))


class FinalLayer(nn.Module):
    """Tokens (B, N, T, C) to the voxels of their cubes (B, N, T, patch_size³·out_dim), modulated by (B, K)."""

    def __init__(self, dim: int, patch_size: int, out_dim: int, cond_dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size**3 * out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)  # (B, C) each
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, N, T, p³·out_dim)


# -------------------------------------------------------------------------------------------------- inter-patch flow


class ConvBlock(nn.Module):
    """3³ convolution, group norm, optional scale and shift, SiLU: (B, in, d, h, w) to (B, out, d, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.proj = Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.GroupNorm(num_groups, out_channels)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))  # (B, out, d, h, w)
        if scale_shift is not None:
            scale, shift = (value[:, :, None, None, None] for value in scale_shift)  # (B, out, 1, 1, 1)
            x = x * (scale + 1) + shift
        return F.silu(x)


class ResnetBlock(nn.Module):
    """Two conv blocks with a shortcut; the condition (B, cond_dim) modulates the first. cond_dim None: no condition."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, cond_dim: int | None = None):
        super().__init__()
        self.mlp = None if cond_dim is None else nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * out_channels))
        self.block1 = ConvBlock(in_channels, out_channels, num_groups)
        self.block2 = ConvBlock(out_channels, out_channels, num_groups)
        same = in_channels == out_channels
        self.res_conv = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        scale_shift = None if self.mlp is None else self.mlp(condition).chunk(2, dim=-1)  # (B, out) each
        hidden = self.block1(x, scale_shift)  # (B, out, d, h, w)
        return self.block2(hidden) + self.res_conv(x)  # (B, out, d, h, w)


class SpatialAttention(nn.Module):
    """Multi-head self-attention over all voxels of a feature map, (B, C, d, h, w) to the same shape."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(channels, 3 * num_heads * HEAD_DIM, bias=False)
        self.to_out = nn.Conv3d(num_heads * HEAD_DIM, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        depth, height, width = x.shape[2:]
        qkv = self.to_qkv(rearrange(x, "b c d h w -> b (d h w) c"))  # (B, T, 3·heads·32)
        q, k, v = rearrange(qkv, "b t (three heads e) -> three b heads t e", three=3, heads=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, 32)
        x = rearrange(x, "b heads (d h w) e -> b (heads e) d h w", d=depth, h=height, w=width)
        return self.to_out(x)  # (B, C, d, h, w)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each voxel, with a gain and no bias; float32 under autocast, as torch's norms.

    In fp16 the variance of values with a standard deviation of 300 would be infinite, and the result 0.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.gamma.dtype)
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)  # (B, 1, d, h, w)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.gamma


class PreNorm(nn.Module):
    """fn(norm(x))."""

    def __init__(self, channels: int, fn: nn.Module):
        super().__init__()
        self.fn = fn
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


def residual_attention(channels: int, num_heads: int) -> Residual:
    """Pre-normed spatial attention added to its input; the nesting gives the names of the published checkpoints."""
    return Residual(PreNorm(channels, SpatialAttention(channels, num_heads)))


def downsample(channels: int) -> Conv3d:
    """Halve the grid: 4³ convolution with stride 2."""
    return Conv3d(channels, channels, kernel_size=4, stride=2, padding=1)


def upsample(channels: int) -> ConvTranspose3d:
    """Double the grid: 4³ transposed convolution with stride 2."""
    return ConvTranspose3d(channels, channels, kernel_size=4, stride=2, padding=1)
