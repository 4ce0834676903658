"""Options of both training stages of the Patch-Volume autoencoder, and of encoding with it.

The keys of training are the published ones (`model.*`, `dataset.*`).
"""

from dataclasses import dataclass, field

from config.schema.option import (
    BEGINNING,
    EXTENDS,
    FREE,
    arithmetic,
    continue_from,
    device_flag,
    flag,
    keep_checkpoints,
    key,
    logger,
    set_anew,
    shard,
    tuned,
)
from config.schema.rules import (
    Rule,
    at_least,
    batch,
    below_one,
    betas,
    between,
    interval,
    not_negative,
    one_of,
    positive,
    regex,
    share,
    workers,
)

downsampling = Rule(
    lambda value: len(value) == 3 and len(set(value)) == 1 and 1 < value[0] <= 64 and value[0] & (value[0] - 1) == 0,
    "three equal powers of two from 2 to 64, e.g. [8,8,8]",
)


@dataclass
class AutoencoderModelConfig:
    """Patch-Volume autoencoder: architecture, losses, optimisation and run."""

    embedding_dim: int = key(8, "channels of a latent (E)", between(1, 512), section="Architecture")
    n_codes: int = key(8192, "vectors in the codebook", between(1, 2**20))
    n_hiddens: int = key(
        48, "width of the first encoder level; each downsampling but the last doubles it", between(1, 1024)
    )
    downsample: list[int] = key([8, 8, 8], "compression per axis (z, x, y): three equal powers of two", downsampling)
    norm_type: str = key("group", "norm layers: group | batch (synchronised over processes)", one_of("group", "batch"))
    num_groups: int = key(24, "groups of each GroupNorm; must divide n_hiddens", at_least(1))

    no_random_restart: bool = tuned(False, "true: codes that fall out of use are never restarted", section="Codebook")
    restart_thres: float = tuned(
        1.0, "codes with a running count below this restart from encoder outputs", not_negative
    )
    codebook_decay: float = tuned(0.99, "decay of the codebook's running averages, per training batch", below_one)
    codebook_init_step: int = tuned(
        0, "optimiser step at which the codebook starts from data; before it latents pass unquantised", not_negative
    )

    disc_channels: int = key(32, "width of the discriminator's first stage", between(1, 512), section="Losses")
    disc_layers: int = key(3, "strided stages of the discriminator", between(1, 8, "each halves a patch"))
    disc_loss_type: str = tuned("hinge", "discriminator loss: hinge | vanilla", one_of("hinge", "vanilla"))
    discriminator_iter_start: int = tuned(20000, "optimiser step at which the adversarial terms start", not_negative)
    volume_gan_weight: float = tuned(2.0, "weight of the adversarial term; 0 = no discriminator", not_negative)
    gan_feat_weight: float = tuned(4.0, "weight of the discriminator's feature matching", not_negative)
    l1_weight: float = tuned(4.0, "weight of the L1 reconstruction error", not_negative)
    perceptual_weight: float = tuned(2.0, "weight of the perceptual loss; 0 = its network is never built", not_negative)
    perceptual_3d: bool = tuned(False, "true: 3D MedicalNet features; false: 2D LPIPS on slices of the three axes")
    perceptual_weights: str | None = key(
        None, "folder with the perceptual network's weights; null = the usual place", resume=FREE
    )

    stage: int = key(
        1, "1: patches, whole model; 2: volumes, decoder and post_vq_conv only", one_of(1, 2), section="Optimisation"
    )
    batch_size: int = tuned(24, "patches (stage 1) or volumes (stage 2) per process and step", batch)
    lr: float = tuned(3e-4, "learning rate of both Adam optimisers", positive)
    adam_betas: list[float] = tuned([0.5, 0.9], "Adam betas of both optimisers", betas)
    lr_schedule: str = tuned("constant", "constant | cosine (falls to 0 over max_steps)", one_of("constant", "cosine"))
    lr_warmup: int = tuned(0, "optimiser steps over which the learning rate rises linearly from 0", not_negative)
    gradient_clip: float = tuned(0.0, "largest gradient norm; 0 = no clipping", not_negative)
    max_steps: int = key(1_000_000, "optimiser steps to train for; -1 = no limit", at_least(-1), resume=EXTENDS)
    max_epochs: int = key(10_000, "epochs to train for; -1 = no limit", at_least(-1), resume=EXTENDS)

    seed: int = tuned(1234, "seed of weights, data order, crops and augmentation", not_negative, section="Run")
    num_workers: int = key(
        8, "data loading processes, at most one per core; 0 = in the main process", workers, resume=FREE
    )
    gpus: int = key(1, "devices of one node; on CPU the number of processes", at_least(1), resume=EXTENDS)
    oversubscribe: bool = key(False, "on CPU: gpus may be more than the cores", resume=FREE)
    accelerator: str = key("auto", "auto (GPU if there is one) | cpu | gpu", one_of("auto", "cpu", "gpu"), resume=FREE)
    precision: str = tuned("32", "32 | bf16 | 16 (both mixed precision)", one_of("32", "bf16", "16"))
    arithmetic: str = arithmetic(has_flag=False)
    channels_last: bool = key(False, "networks and activations with the channels innermost in memory", resume=FREE)
    compile: bool = key(False, "compile encoder, decoder and discriminator for training", resume=FREE)
    gradient_checkpointing: bool = key(
        False, "recompute residual blocks in the backward pass: less memory, more time, same gradients", resume=FREE
    )
    default_root_dir: str | None = key(None, "folder for logs, checkpoints and resolved config; required", resume=FREE)
    resume_from_checkpoint: str | None = key(
        None, "checkpoint. Stage 1 continues it; null = a new run. Stage 2 starts from it; required", resume=BEGINNING
    )
    continue_from: str | None = continue_from()
    set_anew: bool = set_anew()
    checkpoint_every: int = key(3000, "optimiser steps between checkpoints", at_least(1), resume=FREE)
    keep_checkpoints: int = keep_checkpoints()
    val_every: int | None = key(
        None, "optimiser steps between validations; null = checkpoint_every", at_least(1), resume=FREE
    )
    val_volumes: int | None = key(
        32, "most volumes of a validation, always the same, of all names; null = all", at_least(1), resume=FREE
    )
    log_every: int = key(50, "optimiser steps between logged losses", at_least(1), resume=FREE)
    logger: str = logger()
    log_volume_every: int = key(
        1500, "batches between logged volumes (and at powers of two before); 0 = none", not_negative, resume=FREE
    )


@dataclass
class AutoencoderDataConfig:
    """Training data of the autoencoder."""

    root_dir: str | None = key(None, "JSON file: name -> folder or list of folders with *.nii.gz; required")
    image_channels: int = key(1, "channels of a volume", between(1, 16))
    imgtype: str = key("CT", "modality, for the record only", resume=FREE)
    patch_size: int = key(
        64,
        "edge of a patch in voxels; a multiple of model.downsample",
        between(1, 512, "the largest volumes"),
    )
    intensity_range: list[float] = key([-1.0, 1.0], "lowest and highest intensity; files outside are refused", interval)
    split: str | None = key(
        None, "split.json (dataset/split.py); null = that beside the JSON, if there is one; none = the three keys below"
    )
    val_fraction: float = key(0.1, "without split.json: share of the files held out for validation", below_one)
    split_seed: int = key(0, "seed of the split into training and validation files", not_negative)
    subject_pattern: str | None = key(
        None,
        r"regular expression that finds a file's subject in its path below the class folder, e.g. 'sub-\d+'; a subject "
        "is on one side only. null = each file is a subject of its own",
        regex,
    )
    background_keep: float = tuned(
        1.0, "chance to keep a patch with under 10 % foreground; all-background: never", share
    )
    augmentation: bool = tuned(True, "random flips and quarter turns of training data")
    cache: str = key(
        "int16",
        "uncompressed copies of the volumes: int16 (2 bytes a voxel) | float32 (4, exact) | none",
        one_of("int16", "float32", "none"),
        resume=FREE,
    )
    cache_dir: str | None = key(
        None, "folder of the cache; null = FOLDER_cache beside each folder of volumes", resume=FREE
    )
    cache_limit_gb: float | None = key(
        None, "largest size of the cache in GB; null = what the disk holds", positive, resume=FREE
    )


@dataclass
class AutoencoderConfig:
    """Both training stages of the Patch-Volume autoencoder."""

    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    dataset: AutoencoderDataConfig = field(default_factory=AutoencoderDataConfig)


@dataclass
class LatentConfig:
    """Encoding of a data set into latents (train/generate_training_latent.py)."""

    data_path: str | None = flag(None, "JSON: class id -> folder; latents go to FOLDER_latents beside it; required")
    AE_ckpt: str | None = flag(None, "autoencoder checkpoint; required")
    batch_size: int = flag(4, "volumes of equal size encoded together", batch)
    num_workers: int = flag(8, "data loading processes, at most one per core; 0 = in the main process", workers)
    sliding_window: int | None = flag(
        None, "patches per volume encoded at a time; null = by the memory that is free", at_least(1)
    )
    intensity_range: list[float] | None = flag(
        None, "lowest and highest intensity of the files; null = as recorded in the checkpoint, else -1 1", interval
    )
    arithmetic: str = arithmetic()
    shard: str | None = shard()
    device: str = device_flag()
