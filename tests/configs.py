"""Configurations that tests share: the official autoencoder of the golden data, and a tiny one."""

from omegaconf import DictConfig, OmegaConf

OFFICIAL_8X = {
    "model": {
        "seed": 1234,
        "num_workers": 8,
        "gpus": 1,
        "batch_size": 24,
        "precision": 32,
        "lr": 3e-4,
        "discriminator_iter_start": 20000,
        "downsample": [8, 8, 8],
        "max_steps": 1_000_000,
        "max_epochs": 10_000,
        "perceptual_3d": False,
        "embedding_dim": 8,
        "n_codes": 8192,
        "n_hiddens": 48,
        "disc_channels": 32,
        "disc_layers": 3,
        "disc_loss_type": "hinge",
        "volume_gan_weight": 2,
        "l1_weight": 4,
        "gan_feat_weight": 4,
        "perceptual_weight": 2,
        "restart_thres": 1.0,
        "no_random_restart": False,
        "norm_type": "group",
        "num_groups": 24,
        "stage": 1,
        "i3d_feat": False,
        "default_root_dir": None,
        "resume_from_checkpoint": None,
    },
    "dataset": {"root_dir": None, "image_channels": 1, "imgtype": "CT", "patch_size": 64},
}
TINY_4X = {
    "downsample": [4, 4, 4],
    "n_hiddens": 8,
    "num_groups": 4,
    "embedding_dim": 4,
    "n_codes": 32,
    "disc_channels": 4,
    "perceptual_weight": 0,
    "batch_size": 2,
}


def official_autoencoder(patch_size: int = 64, **model) -> DictConfig:
    """The complete official configuration at 8x, `model` keys replaced."""
    cfg = OmegaConf.create(OFFICIAL_8X)
    cfg.dataset.patch_size = patch_size
    return OmegaConf.merge(cfg, {"model": model})


def tiny_autoencoder(patch_size: int = 16, **model) -> DictConfig:
    """A 4x autoencoder that runs in milliseconds, without perceptual loss."""
    return official_autoencoder(patch_size, **{**TINY_4X, **model})
