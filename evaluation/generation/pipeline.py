"""Autoencoder and BiFlowNet as functions, for notebooks and other programs: arrays in, arrays out, no folders.

    pipeline = Pipeline("AE_8x.ckpt", "BiFlowNet_8x.pt")
    latent = pipeline.encode("scan.nii.gz")
    volume = pipeline.generate("CTChestAbdomen", seed=1, sampling_strategy="dpm++", ddim_steps=25)[0]
    nibabel.Nifti1Image(volume.array, volume.affine)

Root `hubconf.py` makes one from anywhere on disk.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.decoding import decode
from AutoEncoder.encoding import encode
from AutoEncoder.patches import crop_to
from common.checkpoint_files import load_checkpoint
from common.errors import UserError
from common.precision import check_precision, configure_backend
from common.processes import choose_device
from config.loading import CONFIG_FOLDER, load_config
from config.schema.diffusion import DiffusionModelConfig, GenerationConfig
from config.schema.option import options_of
from dataset.volumes.volume_io import read_model_volume
from ddpm.checkpoint import trained_options
from ddpm.process import SAMPLERS_OF
from evaluation.generation.requests import list_requests
from evaluation.generation.run import (
    Generated,
    batches_of,
    check_requests,
    generated_volumes,
    load_denoiser,
    max_bytes,
    take_options,
)

NETWORK = {option.name for option in options_of(DiffusionModelConfig)}
NUM_CLASSES = DiffusionModelConfig().num_classes
# What a pipeline is made with; a call can't change it.
OF_PIPELINE = {*NETWORK, "adapters", "arithmetic", "channels_last", "compile", "downsample", "class_table", "classes"}
OF_SCRIPT = {"AE_ckpt", "model_ckpt", "device", "class_names", "requests", "output_dir", "output_dtype", "loss_type"}


class Pipeline:
    """A trained model. What it generates is what evaluation/class_conditional_generation.py writes, bit for bit.

    Args:
        AE_ckpt, model_ckpt: paths, or hf://OWNER/NAME/FILE[@REVISION].
        config: YAML file of generation, for the class table and options; None: config/generation_8x.yaml or _4x.yaml,
            and a flow's own sampler.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or a torch.device.
        options: keys of config/generation_base.yaml, e.g. adapters=[FILE] or class_table=FILE. The network is that of
            the checkpoint, as far as it says; what else is given here holds for every call.

    On a GPU `arithmetic` says what float32 means, for the whole process.

    Raises:
        UserError: files that do not belong together, options that are none.
    """

    def __init__(
        self,
        AE_ckpt: str | PathLike,
        model_ckpt: str | PathLike,
        config: str | PathLike | None = None,
        device: str | torch.device = "auto",
        **options: Any,
    ) -> None:
        _refuse(options, OF_SCRIPT)
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.autoencoder = load_autoencoder(str(AE_ckpt), self.device)
        checkpoint = load_checkpoint(str(model_ckpt))
        trained = network_options(checkpoint)
        factor = self.autoencoder.downsample_factor
        if config is None:
            config = CONFIG_FOLDER / f"generation_{factor}x.yaml"
            if trained.get("num_classes", NUM_CLASSES) != NUM_CLASSES:  # not the paper's, whose table that is
                trained["classes"] = []
            trained["sampling_strategy"] = next(iter(SAMPLERS_OF[trained.get("process", "diffusion")]))
        self._config = Path(config)
        files = {"AE_ckpt": str(AE_ckpt), "model_ckpt": str(model_ckpt), "output_dir": ""}
        self._options = {**trained, **files, **options}
        cfg = self._settings({})
        if cfg.downsample != factor:
            raise UserError(
                f"{AE_ckpt}: compresses by {factor}x, the class table of {options.get('class_table') or config} is for "
                f"{cfg.downsample}x: give a table for {factor}x"
            )
        configure_backend(self.device, cfg.arithmetic)
        self.model, self.process = load_denoiser(cfg, self.autoencoder, checkpoint, self.device)
        self._about = {name: value for name, value in checkpoint.items() if name == "args"}  # not the weights

    def encode(self, volume: Tensor | str | PathLike, intensity_range: Sequence[float] | None = None) -> Tensor:
        """Normalised latent (E, d, h, w) of a NIfTI file, or of a tensor (1, D, H, W) in [-1, 1], D = z, H = x, W = y.

        intensity_range: of a file; None: that of the autoencoder's training.
        """
        if isinstance(volume, str | PathLike):
            trained = self.autoencoder.cfg.dataset.get("intensity_range") or (-1.0, 1.0)
            volume = read_model_volume(volume, intensity_range or list(trained)).data
        return encode(self.autoencoder, volume)

    def decode(self, latent: Tensor, size: Sequence[int] | None = None, **options: Any) -> Tensor:
        """Volume (1, D, H, W) float32 in [-1, 1], on the CPU, of a latent (E, d, h, w).

        size: (D, H, W) of the volume that was encoded, which whole patches exceed. options: decoding, tile, ….
        """
        _refuse(options, OF_SCRIPT)
        cfg = self._settings(options)
        how = (cfg.decoding, None if cfg.decoding == "exact" else cfg.tile, max_bytes(cfg), cfg.precision)
        volume = decode(self.autoencoder, latent.to(self.device), *how)  # (1, D, H, W)
        return volume if size is None else crop_to(volume, size)

    def generate(self, classes: str | int | Sequence[str | int] = (), **options: Any) -> list[Generated]:
        """Volumes of classes by name or id (none: all of the table), in the order that they are asked for.

        options: keys of config/generation_base.yaml: seed, num_samples, resolution, spacing, attributes,
        sampling_strategy, ddim_steps, guidance_scale, ….

        Raises:
            UserError: as the script, for a class, size or option that is none.
        """
        _refuse(options, OF_SCRIPT)
        names = [classes] if isinstance(classes, str | int) else classes
        cfg = self._settings({**options, "class_names": [str(name) for name in names]})
        take_options(cfg, self.model, self._about)
        requests = list_requests(cfg)
        check_requests(cfg, requests, self.model, self.autoencoder, self.device)
        batches = batches_of(cfg, requests)
        made = generated_volumes(cfg, batches, self.model, self.process, self.autoencoder, self.device)
        of_path = {volume.request.path: volume for volume in made}
        return [of_path[request.path] for request in requests]

    def _settings(self, options: dict[str, Any]) -> DictConfig:
        """The checked options of a call."""
        if wrong := sorted(options.keys() & OF_PIPELINE):
            raise UserError(f"{wrong[0]}: an option of the pipeline, not of a call: make another pipeline with it")
        cfg = load_config(GenerationConfig, self._config, values={**self._options, **options})
        check_precision(self.device, "precision", cfg.precision)
        return cfg


def network_options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its network; of the rest the defaults are the official values."""
    return {name: value for name, value in trained_options(checkpoint).items() if name in NETWORK}


def _refuse(options: dict[str, Any], names: set[str]) -> None:
    if wrong := sorted(options.keys() & names):
        raise UserError(f"{wrong[0]}: an option of the script, without effect here: leave it out")
