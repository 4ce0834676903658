"""Options of a ControlNet's training and of controlled generation; the keys are the flags with underscores."""

from dataclasses import dataclass

from config.schema.diffusion import (
    FLOW_STRATEGIES,
    PREDICTIONS,
    PROCESSES,
    SAMPLING_STRATEGIES,
    DiffusionModelConfig,
    SeveralSizesConfig,
    attribute_name,
)
from config.schema.option import arithmetic, device_flag, flag, key, shard, tuned
from config.schema.rules import batch, below_one, between, not_negative, one_of, positive, share

HINTS = ("image", "mask", "latent")  # those of dataset/hints.py


@dataclass
class Hint:
    """One row of `hints`: what a ControlNet is told, from the folders that the data's JSON names for it."""

    name: str = key("", "its name in the JSON of the data", attribute_name)
    kind: str = key(
        "image",
        "image (latents of other volumes by the same autoencoder) | mask (label maps) | latent (ready-made)",
        one_of(*HINTS),
    )
    labels: dict[str, int] = key({}, "of a mask: the labels that count, e.g. {liver: 1, tumour: 2}")
    bits: bool = key(False, "of a mask of many labels: their bits in place of a channel for each")
    channels: int | None = key(None, "of a latent: how many it has; null = volume_channels", between(1, 512))


@dataclass
class ControlNetConfig(SeveralSizesConfig):
    """Training of a ControlNet beside a frozen BiFlowNet (train/train_ControlNet.py)."""

    base_ckpt: str | None = flag(
        None, "BiFlowNet checkpoint, whose averaged weights stay as they are; required", section="Files"
    )
    model: str = flag("ControlNet", "name of the model, part of the run folder's name", section="Model")
    hints: list[Hint] = key([], "what it is told: name, kind and, of masks, labels of each; docs/controlled.md")
    control_scale: float = tuned(1.0, "how much what it adds counts in training", positive, flag=True)
    hint_dropout: float = tuned(
        0.0, "share of hints that are left out, for guidance; 0 = none", below_one, flag=True, section="Diffusion"
    )


@dataclass
class ControlledGenerationConfig(DiffusionModelConfig):
    """Generation that follows conditions (evaluation/controlled_generation.py)."""

    process: str | None = key(None, "diffusion | flow; null = as the checkpoint was trained", one_of(*PROCESSES))
    prediction: str | None = key(None, "noise | v | x0; null = as the checkpoint was trained", one_of(*PREDICTIONS))

    data: str | None = flag(None, "JSON of conditions, or JSON:SIDE of its split; required", section="Files")
    AE_ckpt: str | None = flag(None, "autoencoder checkpoint; required")
    base_ckpt: str | None = flag(None, "BiFlowNet checkpoint that the ControlNet was trained beside; required")
    model_ckpt: str | None = flag(None, "ControlNet checkpoint; required")
    output_dir: str | None = flag(None, "folder that gets CLASS_ID/NAME.nii.gz; required")
    nnunet: str | None = flag(
        None, "of masks: folder DatasetNNN_NAME that gets volumes and masks as a raw data set of nnU-Net v2"
    )
    hints: list[Hint] = key([], "of a ControlNet whose file doesn't say its hints: as of its training")
    control_scale: float = flag(1.0, "how much what the ControlNet adds counts", not_negative, section="Sampling")
    guidance_scale: float = flag(
        1.0, "guidance by the hint; 1 = off, others need a ControlNet trained with hint_dropout", not_negative
    )
    data_consistency: bool = flag(False, "bring each volume to agree with what was measured (dataset/degrade.py)")
    consistency_steps: int = flag(
        0, "with data_consistency: last sampling steps in which the estimate is brought to agree too", not_negative
    )
    sampling_strategy: str = flag(
        "ddim", "ddpm | ddim | dpm++ | unipc; of a flow euler", one_of(*SAMPLING_STRATEGIES, *FLOW_STRATEGIES)
    )
    ddim_steps: int = key(
        50,
        "steps of ddim, dpm++ and unipc, at most timesteps; of euler",
        between(1, 100_000),
        flag="--ddim_steps",
    )
    eta: float = flag(0.0, "noise of ddim alone: 0 = deterministic, 1 = as much as ddpm", share)
    seed: int = flag(0, "seed of the noise", not_negative)
    num_samples: int = flag(
        1,
        "volumes of each condition; of several mean and standard deviation too",
        between(1, 100_000, "volumes of one run"),
    )
    batch_size: int = flag(1, "latents sampled together", batch)
    num_pictures: int = flag(8, "conditions in contact_sheet.png", between(0, 1000))
    arithmetic: str = arithmetic()
    shard: str | None = shard()
    device: str = device_flag()
    downsample: int = key(8, "compression of the autoencoder: 8 | 4", one_of(8, 4), section="Decoding")
