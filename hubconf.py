"""This repository for torch.hub: models and a pipeline from anywhere on disk, in a few lines (docs/weights.md).

pipeline = torch.hub.load("/path/to/repository", "pipeline", source="local", AE_ckpt=FILE, model_ckpt=FILE)
"""

import sys
from pathlib import Path

dependencies = ["torch", "einops", "hydra", "isal", "matplotlib", "nibabel", "omegaconf", "safetensors", "tqdm"]

_ROOT = Path(__file__).resolve().parent
_PACKAGES = ("AutoEncoder", "common", "config", "dataset", "ddpm", "evaluation")


def _check_names():
    """Our packages have everyday names; one of another project that was imported first would be taken for ours."""
    for name in _PACKAGES:
        module = sys.modules.get(name)
        places = [*getattr(module, "__path__", []), getattr(module, "__file__", None)]
        if module is not None and not any(place and Path(place).is_relative_to(_ROOT) for place in places):
            raise ImportError(f"{name} of {places[0]} is imported, which hides {_ROOT / name}: start a new Python")


def autoencoder(ckpt, device="cpu"):
    """The Patch-Volume autoencoder of a checkpoint, frozen, in eval mode (AutoEncoder.checkpoint.load_autoencoder).

    ckpt: a path, or hf://OWNER/NAME/FILE[@REVISION]; official, ours or exported.
    """
    _check_names()
    from AutoEncoder.checkpoint import load_autoencoder

    return load_autoencoder(ckpt, device)


def biflownet(ckpt, device="cpu", **options):
    """BiFlowNet of a checkpoint with its averaged weights, frozen, in eval mode.

    ckpt: as of autoencoder. options: keys of config/generation_base.yaml under Model, where the file doesn't say them.
    """
    _check_names()
    from common.checkpoint_files import load_checkpoint
    from config.loading import load_config
    from config.schema.diffusion import DiffusionModelConfig
    from ddpm.checkpoint import load_biflownet
    from evaluation.generation.pipeline import network_options

    checkpoint = load_checkpoint(ckpt)
    cfg = load_config(DiffusionModelConfig, None, values={**network_options(checkpoint), **options})
    return load_biflownet(cfg, ckpt, device, checkpoint)


def pipeline(AE_ckpt, model_ckpt, config=None, device="auto", **options):
    """Encodes, decodes and generates: evaluation.generation.pipeline.Pipeline, which says what it takes."""
    _check_names()
    from evaluation.generation.pipeline import Pipeline

    return Pipeline(AE_ckpt, model_ckpt, config, device, **options)
