"""BiFlowNet, the denoiser: an intra-patch flow for local detail and an inter-patch flow for global structure.

Wang et al., "3D MedDiffusion: A 3D Medical Latent Diffusion Model for Controllable and High-quality Medical Image
Generation", IEEE TMI 2025 (arXiv 2412.13059), section III-B.

Letters: B batch, C latent channels, d h w latent grid (z, x, y); N = n0·n1·n2 sub-volumes of s0 × s1 × s2 voxels,
T tokens of a sub-volume, p patch_size; K width of the condition; M width of the U-Net's first level; L levels, the
first F of which keep that width and take part in both flows.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm import blocks
from ddpm.architecture import check_arguments, count_down_factor, count_flow_levels, grid_multiple
from ddpm.attributes import AttributeEmbedding, AttributeSpec
from ddpm.blocks import DiTBlock, FinalLayer, PatchEmbed_Voxel, ResnetBlock
from ddpm.diffusion import GaussianDiffusion

Grid = tuple[int, int, int]

__all__ = ["BiFlowNet", "GaussianDiffusion", "PatchEmbed_Voxel"]


class BiFlowNet(nn.Module):
    """Noise prediction for normalised latents, conditioned on timestep, class and resolution.

    The intra-patch flow cuts the latent into sub-volumes and runs transformer blocks within each; the feature maps that
    its blocks give are added to the levels of full width of the inter-patch flow, a 3D U-Net over the whole latent.

    Args:
        dim: base width; tokens have it, and U-Net level i has dim·dim_mults[i] channels.
        learn_sigma: predict twice the channels (noise and a variance, which GaussianDiffusion does not use).
        cond_classes: number of classes; None: no class condition.
        dim_mults: widths of the U-Net's levels, in dim.
        sub_volume_size: latent voxels of a sub-volume (z, x, y).
        patch_size: latent voxels per edge of a token, 1 for 8x latents, 2 for 4x.
        channels: latent channels, C.
        attn_heads: heads of 32 channels of the U-Net's attention.
        init_dim: width of the first convolution, M; None: dim.
        init_kernel_size: its kernel, odd.
        use_sparse_linear_attn: which levels have attention, one flag each, mirrored on the way up.
        resnet_groups: groups of the U-Net's group norms.
        DiT_num_heads: heads of the intra-patch flow's attention.
        mlp_ratio: hidden width of its MLPs, in dim.
        vq_size: latent grid size for which ``res`` is 1; callers divide by it.
        res_condition: whether ``forward`` takes ``res``.
        num_mid_DiT: transformer blocks between the input and output blocks of the intra-patch flow.
        null_label: one more class, id cond_classes, for samples without a label (classifier-free guidance).
        attributes: what else the network is told of a sample; beside the official one.

    Attributes:
        gradient_checkpointing: keep only the inputs of blocks for the backward pass, which computes the rest again:
            less memory for a third more work, and the same gradients. False at first; no part of a checkpoint file.

    Raises:
        ValueError: arguments that do not fit together, all of them in one message.
    """

    def __init__(
        self,
        dim,
        learn_sigma=False,
        cond_classes=None,
        dim_mults=(1, 1, 2, 4, 8),
        sub_volume_size=(8, 8, 8),
        patch_size=2,
        channels=3,
        attn_heads=8,
        init_dim=None,
        init_kernel_size=3,
        use_sparse_linear_attn=(0, 0, 0, 1, 1),
        resnet_groups=24,
        DiT_num_heads=8,
        mlp_ratio=4,
        vq_size=64,
        res_condition=True,
        num_mid_DiT=1,
        null_label=False,
        attributes: tuple[AttributeSpec, ...] = (),
    ):
        super().__init__()
        init_dim = dim if init_dim is None else init_dim
        widths = [init_dim, *(dim * mult for mult in dim_mults)]
        check_arguments(
            dim=dim,
            widths=widths,
            attention=use_sparse_linear_attn,
            sub_volume_size=sub_volume_size,
            patch_size=patch_size,
            init_kernel_size=init_kernel_size,
            resnet_groups=resnet_groups,
            num_heads=DiT_num_heads,
            needs_classes=null_label and cond_classes is None,
        )
        self.gradient_checkpointing = False
        self.channels = channels
        self.out_channels = 2 * channels if learn_sigma else channels
        self.cond_classes = cond_classes
        self.null_label = cond_classes if null_label else None
        self.res_condition = res_condition
        self.vq_size = vq_size
        self.patch_size = patch_size
        self.sub_volume_size = tuple(sub_volume_size)
        self.num_flow_levels = count_flow_levels(widths)  # F
        self.down_factor = count_down_factor(widths)
        self.grid_multiple = grid_multiple(widths, sub_volume_size)

        # The order of the parameters is that of the published checkpoints.
        cond_dim = 8 * dim if res_condition else 4 * dim
        num_tokens = math.prod(size // patch_size for size in sub_volume_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, dim), requires_grad=False)
        self.init_conv = nn.Conv3d(channels, init_dim, init_kernel_size, padding=init_kernel_size // 2)
        self._build_conditions(dim)
        self._build_intra_patch_flow(dim, init_dim, cond_dim, DiT_num_heads, mlp_ratio, num_mid_DiT)
        self._build_inter_patch_flow(widths, cond_dim, use_sparse_linear_attn, attn_heads, resnet_groups)
        self.final_conv = nn.Sequential(
            ResnetBlock(2 * init_dim, dim, resnet_groups), nn.Conv3d(dim, self.out_channels, kernel_size=1)
        )
        self.attribute_emb = AttributeEmbedding(attributes, 4 * dim) if attributes else None
        self.initialize_weights()

    def _build_conditions(self, dim: int) -> None:
        self.time_mlp = nn.Sequential(
            blocks.SinusoidalEmbedding(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim)
        )
        if self.cond_classes is not None:
            self.cond_emb = nn.Embedding(self.cond_classes + (self.null_label is not None), 4 * dim)
        if self.res_condition:
            self.res_mlp = nn.Sequential(nn.Linear(3, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))

    def _build_intra_patch_flow(self, dim, init_dim, cond_dim, num_heads, mlp_ratio, num_mid) -> None:
        """F stages of a transformer block and a final layer, num_mid blocks, F stages whose blocks take a skip."""

        def dit_block(skip: bool) -> DiTBlock:
            return DiTBlock(dim, num_heads, cond_dim, mlp_ratio, skip)

        def stage(skip: bool) -> nn.ModuleList:
            return nn.ModuleList([dit_block(skip), FinalLayer(dim, self.patch_size, init_dim, cond_dim)])

        self.x_embedder = PatchEmbed_Voxel(self.sub_volume_size, self.patch_size, self.channels, dim)
        self.IntraPatchFlow_input = nn.ModuleList(stage(skip=False) for _ in range(self.num_flow_levels))
        self.IntraPatchFlow_mid = nn.ModuleList(dit_block(skip=False) for _ in range(num_mid))
        self.IntraPatchFlow_output = nn.ModuleList(stage(skip=True) for _ in range(self.num_flow_levels))

    def _build_inter_patch_flow(self, widths, cond_dim, attention_flags, attn_heads, resnet_groups) -> None:
        """A U-Net whose way up mirrors the way down; level i goes from widths[i] to widths[i + 1]."""
        num_levels, num_flow = len(widths) - 1, self.num_flow_levels

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(in_channels, out_channels, resnet_groups, cond_dim)

        def attention(channels: int, level: int) -> nn.Module:
            return blocks.residual_attention(channels, attn_heads) if attention_flags[level] else nn.Identity()

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level in range(num_levels):
            below, width = widths[level], widths[level + 1]
            parts = [resnet(below, width), attention(width, level), resnet(width, width), attention(width, level)]
            halves = num_flow - 1 <= level < num_levels - 1
            self.downs.append(nn.ModuleList([*parts, blocks.downsample(width) if halves else nn.Identity()]))
        for level in reversed(range(num_levels)):
            below, width = widths[level], widths[level + 1]
            parts = [resnet(2 * width, width), attention(width, level)]
            parts += [resnet(2 * width, below), attention(below, level)]
            self.ups.append(nn.ModuleList([*parts, blocks.upsample(below) if level >= num_flow else nn.Identity()]))

        self.mid_block1 = resnet(widths[-1], widths[-1])
        self.mid_spatial_attn = blocks.residual_attention(widths[-1], attn_heads)
        self.mid_block2 = resnet(widths[-1], widths[-1])

    def initialize_weights(self) -> None:
        """Fresh weights. Convolutions, norms and the class embedding keep PyTorch's defaults."""
        # Every Linear layer, so that activations keep their variance through layers of different widths.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # The token embedding is a Linear layer written as a convolution: its fan-in is the whole cube.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)

        # Positions are not learned.
        positions = blocks.sincos_position_embedding(self.pos_embed.shape[-1], self.x_embedder.grid_size)
        with torch.no_grad():
            self.pos_embed.copy_(positions[None])

        # adaLN-Zero: with gates of zero each transformer block starts as the identity, from where depth trains best.
        # The intra-patch flow adds nothing to the U-Net at first, and comes in as far as it helps.
        for module in self.modules():
            if isinstance(module, DiTBlock | FinalLayer):
                nn.init.zeros_(module.adaLN_modulation[-1].weight)
                nn.init.zeros_(module.adaLN_modulation[-1].bias)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)

        if self.attribute_emb is not None:
            self.attribute_emb.reset_to_zero()

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        y: Tensor | None = None,
        res: Tensor | None = None,
        attributes: Tensor | None = None,
    ) -> Tensor:
        """Predicted noise, (B, C, d, h, w), twice the channels with learn_sigma.

        Args:
            x: noisy normalised latents (B, C, d, h, w).
            time: timesteps (B,).
            y: class ids (B,), exactly when the model has classes; ``check_conditions`` checks their values.
            res: latent grid size divided by vq_size, (3,) or (B, 3), exactly when the model has res_condition.
            attributes: as `AttributeSpec.encoded` has them, NaN where unknown, (B, A); None: all unknown.

        Raises:
            ValueError: wrong shapes, or a condition missing or superfluous.
        """
        self.check_inputs(x, time, y, res, attributes)
        condition = self.embed_conditions(time, y, res, attributes)  # (B, K)
        features = self.intra_patch_flow(x, condition)  # 2F × (B, M, d, h, w)
        return self.inter_patch_flow(x, condition, features)  # (B, C, d, h, w)

    def embed_conditions(
        self, time: Tensor, y: Tensor | None, res: Tensor | None, attributes: Tensor | None = None
    ) -> Tensor:
        """Timestep, class, resolution and attributes as one vector per sample, (B, K)."""
        condition = self.time_mlp(time)  # (B, 4·dim)
        if y is not None:
            condition = condition + self.cond_emb(y)  # (B, 4·dim)
        if self.attribute_emb is not None:
            if attributes is None:
                attributes = torch.full((len(time), len(self.attribute_emb.specs)), math.nan, device=time.device)
            condition = condition + self.attribute_emb(attributes)  # (B, 4·dim)
        if res is not None:
            resolution = self.res_mlp(res.to(condition.dtype))  # (4·dim) or (B, 4·dim)
            condition = torch.cat([condition, resolution.expand_as(condition)], dim=-1)  # (B, 8·dim)
        return condition

    def intra_patch_flow(self, x: Tensor, condition: Tensor) -> list[Tensor]:
        """2F feature maps (B, M, d, h, w), those of the input blocks before those of the output blocks."""
        features, x, skips, grid = self.intra_patch_input(x, condition)
        for block in self.IntraPatchFlow_mid:
            x = self._run(block, x, condition)  # (B, N, T, dim)
        for block, final_layer in self.IntraPatchFlow_output:
            x = self._run(block, x, condition, skips.pop())  # (B, N, T, dim)
            features.append(self._to_feature_map(final_layer(x, condition), grid))  # (B, M, d, h, w)
        return features

    def intra_patch_input(self, x: Tensor, condition: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor], Grid]:
        """Of the input blocks: feature maps F × (B, M, d, h, w), tokens (B, N, T, dim), skips, sub-volumes per axis."""
        grid = tuple(size // sub for size, sub in zip(x.shape[2:], self.sub_volume_size, strict=True))
        axes = dict(zip(("n0", "n1", "n2"), grid, strict=True))
        x = rearrange(x, "b c (n0 s0) (n1 s1) (n2 s2) -> (b n0 n1 n2) c s0 s1 s2", **axes)
        x = self.x_embedder(x) + self.pos_embed  # (B·N, T, dim)
        x = rearrange(x, "(b n) t c -> b n t c", n=math.prod(grid))

        features, skips = [], []
        for block, final_layer in self.IntraPatchFlow_input:
            x = self._run(block, x, condition)  # (B, N, T, dim)
            skips.append(x)
            features.append(self._to_feature_map(final_layer(x, condition), grid))  # (B, M, d, h, w)
        return features, x, skips, grid

    def _to_feature_map(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N, T, p³·M) back to their places in the latent grid, (B, M, d, h, w)."""
        p = self.patch_size
        axes = dict(zip(("n0", "n1", "n2", "t0", "t1", "t2"), (*grid, *self.x_embedder.grid_size), strict=True))
        pattern = "b (n0 n1 n2) (t0 t1 t2) (p0 p1 p2 c) -> b c (n0 t0 p0) (n1 t1 p1) (n2 t2 p2)"
        return rearrange(tokens, pattern, p0=p, p1=p, p2=p, **axes)

    def inter_patch_flow(
        self, x: Tensor, condition: Tensor, features: Sequence[Tensor], control: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The U-Net, (B, C, d, h, w) to the same; first and last F levels take the feature maps in order.

        control: one map for each level, from the first, and one for the middle, which are added to what the way up
        takes from there (``ddpm/ControlNet.py``).
        """
        x = self.init_conv(x)  # (B, M, d, h, w)
        first, (x, halves) = x, self.way_down(x, condition, features[: self.num_flow_levels])
        if control is not None:
            x = x + control[-1]  # (B, width, …)

        features = iter(features[self.num_flow_levels :])
        for level, (block1, attention1, block2, attention2, grow) in enumerate(self.ups):
            if level >= len(self.ups) - self.num_flow_levels:
                x = x + next(features)  # (B, M, d, h, w)
            skip1, skip2 = halves.pop()
            if control is not None:
                skip2 = skip2 + control[len(halves)]  # (B, width, …)
            x = self._run(_resnet, block1, attention1, x, condition, skip2)  # (B, width, …)
            x = self._run(_resnet, block2, attention2, x, condition, skip1)  # (B, width of the level above, …)
            x = grow(x)  # (B, width of the level above, … · 2)

        block, projection = self.final_conv
        x = self._run(_resnet, block, nn.Identity(), x, None, first)  # (B, dim, d, h, w)
        return projection(x)  # (B, C, d, h, w)

    def way_down(
        self, x: Tensor, condition: Tensor, features: Sequence[Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The middle's output, and both halves of each level (B, width, …), of the first convolution's output."""
        halves = []
        for level, (block1, attention1, block2, attention2, shrink, *_) in enumerate(self.downs):
            if level < self.num_flow_levels:
                x = x + features[level]  # (B, M, d, h, w)
            x = half1 = self._run(_resnet, block1, attention1, x, condition)  # (B, width, …)
            x = half2 = self._run(_resnet, block2, attention2, x, condition)  # (B, width, …)
            halves.append((half1, half2))
            x = shrink(x)  # (B, width, … / 2)
        x = self._run(_resnet, self.mid_block1, self.mid_spatial_attn, x, condition)  # (B, width, …)
        return self._run(self.mid_block2, x, condition), halves  # (B, width, …)

    def _run(self, function: Callable[..., Tensor], *arguments) -> Tensor:
        """function(*arguments), with `gradient_checkpointing` in a way that keeps nothing but the arguments."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # no block draws

    def drop_conditions(self, conditions: Mapping[str, Tensor], is_dropped: Tensor) -> dict[str, Tensor]:
        """The conditions of a batch, without labels and attributes where is_dropped (B,) is true.

        Labels stay where the model has no null label.
        """
        kept = dict(conditions)
        if self.null_label is not None and "y" in kept:
            kept["y"] = kept["y"].masked_fill(is_dropped, self.null_label)
        if "attributes" in kept:
            kept["attributes"] = kept["attributes"].masked_fill(is_dropped[:, None], math.nan)
        return kept

    def check_conditions(self, conditions: Mapping[str, Tensor]) -> None:
        """Raise ValueError for class ids, or categories of attributes, that the model does not have.

        Not part of ``forward``: it reads values, which makes a GPU wait and breaks a compiled graph. Sampling calls it
        once, the loss on a CPU alone.
        """
        y, num_ids = conditions.get("y"), 0 if self.cond_classes is None else self.cond_emb.num_embeddings
        if y is not None and y.numel() and num_ids and not 0 <= int(y.min()) <= int(y.max()) < num_ids:
            null = "" if self.null_label is None else f" ({self.null_label}: no class)"
            raise ValueError(f"class ids {sorted(set(y.tolist()))}: this model knows 0 to {num_ids - 1}{null}.")
        if self.attribute_emb is not None and "attributes" in conditions:
            self.attribute_emb.check(conditions["attributes"])

    def check_inputs(
        self, x: Tensor, time: Tensor, y: Tensor | None, res: Tensor | None, attributes: Tensor | None
    ) -> None:
        """Errors as of ``forward``."""
        if x.ndim != 5 or x.shape[1] != self.channels:
            raise ValueError(f"latents have shape {tuple(x.shape)}: expected (B, {self.channels}, d, h, w).")
        if any(size % factor for size, factor in zip(x.shape[2:], self.grid_multiple, strict=True)):
            raise ValueError(
                f"latent grid {tuple(x.shape[2:])} has to be divisible by {self.grid_multiple} (sub-volumes of "
                f"{self.sub_volume_size}, U-Net down-sampling {self.down_factor}): choose another volume size."
            )
        batch = x.shape[0]
        if tuple(time.shape) != (batch,):
            raise ValueError(f"time has shape {tuple(time.shape)}: expected ({batch},), one timestep per sample.")
        if (y is None) != (self.cond_classes is None):
            wanted = "needs class ids y" if y is None else "has no classes, leave y out"
            raise ValueError(f"cond_classes is {self.cond_classes}: this model {wanted}.")
        if y is not None and tuple(y.shape) != (batch,):
            raise ValueError(f"y has shape {tuple(y.shape)}: expected ({batch},), one class id per sample.")
        if (res is None) == self.res_condition:
            wanted = "needs res, the latent grid size / vq_size" if res is None else "does not take res, leave it out"
            raise ValueError(f"res_condition is {self.res_condition}: this model {wanted}.")
        if res is not None and tuple(res.shape) not in ((3,), (batch, 3)):
            raise ValueError(f"res has shape {tuple(res.shape)}: expected (3,) or ({batch}, 3).")
        if attributes is not None and self.attribute_emb is None:
            raise ValueError("attributes were given: this model has none.")
        if attributes is not None:
            self.attribute_emb.check_shape(attributes, batch)


def _resnet(
    block: nn.Module, attention: nn.Module, x: Tensor, condition: Tensor | None, skip: Tensor | None = None
) -> Tensor:
    """A ResNet block and what follows it, for x (B, C, d, h, w) and, behind its channels, those of a skip."""
    if skip is not None:
        x = torch.cat([x, skip], dim=1)  # (B, 2·C, d, h, w)
    return attention(block(x, condition))
