"""Small models' configurations, and checkpoint files of them as the official release and Lightning write them."""

import argparse
from pathlib import Path

import torch
from omegaconf import DictConfig

from config.loading import load_config
from config.schema.autoencoder import AutoencoderConfig
from config.schema.diffusion import BiFlowNetConfig, GenerationConfig

TINY_AE = (
    "model.n_hiddens=8 model.num_groups=4 model.downsample=[4,4,4] model.n_codes=32 model.embedding_dim=4 "
    "model.disc_channels=4 model.disc_layers=1 model.perceptual_weight=0 model.discriminator_iter_start=0 "
    "dataset.patch_size=16"
).split()
TINY_BIFLOWNET = (
    "model_dim=24 dim_mults=[1,1,2] use_attn=[0,0,1] volume_channels=4 num_classes=3 resnet_groups=4 dit_num_heads=2 "
    "attn_heads=2 patch_size=2"
).split()


def autoencoder_config(*overrides) -> DictConfig:
    return load_config(AutoencoderConfig, None, [*TINY_AE, *overrides])


def biflownet_config(*overrides) -> DictConfig:
    return load_config(BiFlowNetConfig, None, [*TINY_BIFLOWNET, *overrides])


def generation_config(*overrides) -> DictConfig:
    return load_config(GenerationConfig, None, [*TINY_BIFLOWNET, *overrides])


def lightning_file(path: Path, model, hyper_parameters, **more) -> Path:
    """A file as Lightning writes it."""
    state = {name: value.clone() for name, value in model.state_dict().items()} | more.pop("weights", {})
    checkpoint = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "1.7.7",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.1), "best_k_models": {}}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "cfg",
        "hyper_parameters": hyper_parameters,
    }
    torch.save(checkpoint | more, path)
    return path


def biflownet_file(path: Path, model, **more) -> Path:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ema = {name: value + 1 for name, value in weights.items()}
    args = argparse.Namespace(
        volume_channels=model.channels, dim_mults=[1, 1, 2], num_classes=3, ckpt=None, enable_amp=True
    )
    checkpoint = {
        "model": weights,
        "ema": ema,
        "scaler": {"scale": 65536.0},
        "opt": {},
        "args": args,
        "epoch": 2,
        "step": 9,
    }
    torch.save(checkpoint | more, path)
    return path
