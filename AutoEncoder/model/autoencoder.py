"""The Patch-Volume autoencoder: networks, codebook, encode and decode (Wang et al., IEEE TMI 2025, section III-A).

Three spaces, named in every method:
    volume      (B, C, D, H, W), intensities in [-1, 1];
    raw latent  (B, E, d, h, w) = pre_vq_conv(encoder(patch)), stitched; (d, h, w) = (D, H, W)/f, f the compression;
    codes       (B, d, h, w), int64 indices of the nearest codebook vectors.

Its training is in `PatchVolume.py`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from AutoEncoder.exact_decoding import decode_exactly
from AutoEncoder.model.codebook import Codebook
from AutoEncoder.model.networks import Decoder, Encoder, normalize, num_downsamplings
from AutoEncoder.patches import crop_to, pad_to_multiple, split_patches, stitch_patches, tile_slices
from common.memory import free_memory, halving

# Keys that official configurations and checkpoints do not have, with the values that reproduce the official release.
DEFAULTS = {
    "model": {
        "adam_betas": [0.5, 0.9],
        "lr_schedule": "constant",
        "lr_warmup": 0,
        "gradient_clip": 0.0,
        "codebook_decay": 0.99,
        "codebook_init_step": 0,
        "perceptual_weights": None,
        "channels_last": False,
        "compile": False,
        "gradient_checkpointing": False,
    }
}
MOST_PATCHES = 8  # encoded at a time: more gain no speed
FIRST_LEVEL_TENSORS = 8  # of the encoder's first level, as large, that a patch needs at its peak: measured 6
# What the networks are built by: these values stay when another configuration is set.
BUILT_BY = (
    *("model.downsample", "model.n_hiddens", "model.embedding_dim", "model.n_codes", "model.norm_type"),
    *("model.num_groups", "model.disc_channels", "model.disc_layers", "dataset.image_channels"),
)


class Autoencoder(nn.Module):
    """Encodes volumes patch by patch and decodes them whole.

    Args:
        cfg: OmegaConf configuration with the tables `model` and `dataset` (config/base_cfg.yaml has every key; those
            that official ones do not have can be missing).

    Raises:
        ValueError: an option has a value that the networks cannot have.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg
        model = self.cfg.model
        self.embedding_dim = int(model.embedding_dim)
        norm = partial(normalize, norm_type=model.norm_type, num_groups=model.num_groups)
        shape = (model.n_hiddens, model.downsample, self.cfg.dataset.image_channels, self.embedding_dim, norm)
        self.encoder, self.decoder = Encoder(*shape), Decoder(*shape)
        self.pre_vq_conv = nn.Conv3d(self.embedding_dim, self.embedding_dim, kernel_size=1)
        self.post_vq_conv = nn.Conv3d(self.embedding_dim, self.embedding_dim, kernel_size=1)
        self.codebook = Codebook(
            model.n_codes, self.embedding_dim, model.no_random_restart, model.restart_thres, model.codebook_decay
        )

    @property
    def cfg(self) -> DictConfig:
        """The configuration, complete.

        It can be set, as stage 2 does on an autoencoder of stage 1: of the keys that a new one lacks, ours have their
        defaults and others stay as they were. ValueError: it describes other networks than those that are there.
        """
        return self._cfg

    @cfg.setter
    def cfg(self, cfg: DictConfig) -> None:
        before = getattr(self, "_cfg", OmegaConf.create())
        cfg = OmegaConf.merge(before, DEFAULTS, OmegaConf.to_container(OmegaConf.create(cfg), resolve=True))
        for key in BUILT_BY if before else ():
            if (found := OmegaConf.select(cfg, key)) != (built := OmegaConf.select(before, key)):
                raise ValueError(f"{key} is {found}, but the networks of this autoencoder were built with {built}")
        if cfg.model.stage not in (1, 2):
            raise ValueError(f"model.stage is {cfg.model.stage!r}, expected 1 or 2")
        factor, patch_size = 2 ** num_downsamplings(cfg.model.downsample), int(cfg.dataset.patch_size)
        if patch_size % factor:
            raise ValueError(f"dataset.patch_size {patch_size} does not divide by the compression {factor}")
        self._cfg = cfg
        self.stage: int = cfg.model.stage
        self.downsample_factor, self.patch_size = factor, patch_size

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Whole volumes: encode patch by patch, stitch, quantise, decode as one volume.

        (B, C, D, H, W) -> reconstruction of the same shape and the codebook's mapping for the stitched latent. In eval
        mode without gradients in the memory that is free, as `patch_encode` and `decode`; else at once.
        """
        quantised = self.quantise_volume(x)
        volume = self._decode(self.post_vq_conv(quantised["embeddings"]))
        return crop_to(volume, x.shape[-3:]), quantised

    def quantise_volume(self, x: Tensor) -> dict[str, Tensor]:
        """The codebook's mapping for the stitched latent of volumes (B, C, D, H, W)."""
        return self.codebook(self.patch_encode(x))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruction of whole volumes in eval mode, whatever the present modes, which are left as they were."""
        with evaluation_mode(self):
            return self(x)[0]

    def encode(self, x: Tensor, include_embeddings: bool = False, quantize: bool = True):
        """Encode `x` (B, C, D, H, W) in one pass, as a patch is.

        Returns:
            The raw latent (B, E, d, h, w) with `quantize=False`; otherwise the codes (B, d, h, w), or with
            `include_embeddings` the pair of quantised latent (B, E, d, h, w) and codes.
        """
        latent = self.pre_vq_conv(self.encoder(x))
        if not quantize:
            return latent
        quantised = self.codebook(latent)
        if include_embeddings:
            return quantised["embeddings"], quantised["encodings"]
        return quantised["encodings"]

    def patch_encode(self, x: Tensor, quantize: bool = False, patch_size: int | None = None) -> Tensor:
        """Volume -> stitched raw latent (or codes with `quantize`), as many patches at a time as memory allows.

        Args:
            x: (B, C, D, H, W). What does not divide into patches is padded with background at the far ends, and the
                latent is that of the padded volume: cut the decoded volume back to (D, H, W).
            quantize: return code indices (B, d, h, w) instead of the raw latent (B, E, d, h, w).
            patch_size: edge of a patch in voxels; None: the one of the configuration (64).

        Raises:
            ValueError: `patch_size` does not divide by the compression.
        """
        return self.patch_encode_sliding(x, quantize, patch_size, sliding_window=None)

    def patch_encode_sliding(
        self, x: Tensor, quantize: bool = False, patch_size: int | None = None, sliding_window: int | None = 64
    ) -> Tensor:
        """`patch_encode` with at most `sliding_window`·B patches at a time, fewer where memory runs out.

        None: as many as memory allows and speed gains from; with gradients all.
        """
        patch_size = patch_size or self.patch_size
        if patch_size % self.downsample_factor:
            raise ValueError(f"patch_size {patch_size} does not divide by the compression {self.downsample_factor}")
        x = pad_to_multiple(x, patch_size)
        grid = [extent // patch_size for extent in x.shape[-3:]]
        patches = split_patches(x, patch_size)

        def encode(at_once: int) -> Tensor:
            return torch.cat([self.encode(some, quantize=False) for some in patches.split(at_once)])

        if _may_be_cut(self.encoder):
            window = self._patches_at_once(patches) if sliding_window is None else sliding_window * len(x)
            latents = halving(encode, min(window, len(patches)))
        else:
            latents = encode(len(patches) if sliding_window is None else sliding_window * len(x))
        latent = stitch_patches(latents, grid)  # (B, E, d, h, w)
        return self.codebook(latent)["encodings"] if quantize else latent

    def decode(self, latent: Tensor, quantize: bool = True, max_bytes: int | None = None) -> Tensor:
        """Latent -> volume (B, C, f·d, f·h, f·w), decoded as one volume.

        Args:
            latent: raw latent (B, E, d, h, w), snapped to its nearest codes; with `quantize=False` the codes
                (B, d, h, w) themselves.
            max_bytes: memory that decoding may take; what does not fit is decoded block by block, slower and with the
                same result, without gradients (`exact_decoding.py`). None: what is free; with gradients no limit.

        Raises:
            ValueError: `max_bytes` is too little for the smallest blocks.
        """
        vectors = self.codebook(latent)["embeddings"] if quantize else self.codebook.lookup(latent)
        return self._decode(self.post_vq_conv(vectors), max_bytes)

    def _decode(self, vectors: Tensor, max_bytes: int | None = None) -> Tensor:
        """What the decoder takes (B, E, d, h, w) -> volume (B, C, f·d, f·h, f·w), in the memory that there is."""
        if max_bytes is None and not _may_be_cut(self.decoder):
            return self.decoder(vectors)
        limit = free_memory(vectors.device) if max_bytes is None else max_bytes
        return halving(partial(decode_exactly, self.decoder, vectors), limit)

    def _patches_at_once(self, patches: Tensor) -> int:
        """How many of the patches (N, C, p, p, p) are encoded at a time, by the memory that is free."""
        first_level = 4 * self.encoder.conv_first.out_channels * math.prod(patches.shape[2:])  # bytes of one tensor
        fitting = free_memory(patches.device) // (FIRST_LEVEL_TENSORS * first_level)
        return max(1, min(fitting, MOST_PATCHES))

    def decode_sliding(
        self,
        latent: Tensor,
        quantize: bool = False,
        patch_size: int = 256,
        sliding_window: int = 1,
        compress_ratio: int | None = None,
        max_bytes: int | None = None,
    ) -> Tensor:
        """`decode` tile by tile without overlap, as the official release does; tiles meet in visible seams.

        Args:
            latent: as in `decode`, by default codes.
            patch_size: edge of a tile in voxels.
            sliding_window: tiles decoded at a time (those of equal size).
            compress_ratio: voxels per latent cell and axis; None: the model's own.
            max_bytes: as in `decode`, for the tiles that are decoded at a time.

        Raises:
            ValueError: as `decode`; another `compress_ratio` than the model's, or tiles that do not divide by it.
        """
        ratio = self.downsample_factor
        if compress_ratio not in (None, ratio):
            raise ValueError(f"compress_ratio is {compress_ratio}, but this autoencoder compresses {ratio} times")
        if patch_size % ratio:
            raise ValueError(f"patch_size {patch_size} does not divide by the compression {ratio}")
        grid = latent.shape[-3:]
        volume = None
        by_shape: dict[tuple[int, ...], list[tuple[slice, ...]]] = {}
        for tile in tile_slices(grid, patch_size // ratio):
            by_shape.setdefault(tuple(axis.stop - axis.start for axis in tile), []).append(tile)
        for group in by_shape.values():
            for start in range(0, len(group), sliding_window):
                chosen = group[start : start + sliding_window]
                decoded = self.decode(torch.cat([latent[(..., *tile)] for tile in chosen]), quantize, max_bytes)
                if volume is None:
                    size = [extent * ratio for extent in grid]
                    volume = decoded.new_empty(latent.shape[0], decoded.shape[1], *size)
                for tile, piece in zip(chosen, decoded.split(latent.shape[0]), strict=True):
                    voxels = tuple(slice(axis.start * ratio, axis.stop * ratio) for axis in tile)
                    volume[(..., *voxels)] = piece
        return volume


def _may_be_cut(network: nn.Module) -> bool:
    """Whether its work may be cut into pieces: without gradients, and where norms have fixed statistics."""
    return not (torch.is_grad_enabled() or network.training)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every sub-module has the very mode that it had before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
