"""Typed schema of every configuration: each key with its type, default and meaning.

The loader (`config/loading.py`) checks YAML files, overrides and flags against these classes, and `--help` prints
their texts. Autoencoder keys are the published ones (`model.*`, `dataset.*`); the diffusion and generation keys are
the published flags with underscores.
"""

from dataclasses import dataclass, field
from typing import Any


def key(default: Any, meaning: str) -> Any:
    """Dataclass field with a default (lists are copied) and the text that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


# ----------------------------------------------------------------------------------------------------- data


@dataclass
class VolumeClass:
    """One row of the class table: what a class id stands for and in which sizes its volumes are made."""

    id: int = key(0, "class id")
    name: str = key("", "name of its folder, and the start of the file names of generated volumes")
    modality: str | None = key(None, "CT | MR: how preprocessing maps intensities where it isn't told; null = MR")
    grids: list[list[int]] = key([], "latent grids (z, x, y), one volume each")
    spacings_mm: list[list[float]] = key([], "voxel spacing (x, y, z) in mm, one per grid")


@dataclass
class PreprocessConfig:
    """Preparation of NIfTI files and DICOM series for training (dataset/preprocess.py)."""

    # Files
    input: str | None = key(None, "folder with NIfTI files or DICOM series, at any depth; required")
    output_dir: str | None = key(None, "folder that gets one folder per class and the dataset JSONs; required")
    preset: str | None = key(
        None, "class of the table: its name, id, modality, size and spacing. NAME is its first size, NAME_XxYxZ any"
    )
    name: str | None = key(None, "name of the class and of its folder; null = that of the preset")
    class_id: int | None = key(None, "class id; null = the preset's, else the next free one")
    select: str | None = key(
        None, "regular expression, searched in path and series description (any case): other volumes are left out"
    )
    assume_orientation: str | None = key(
        None, "axes of NIfTI files that don't say theirs, e.g. LPS; null = such files are refused"
    )
    # Geometry
    spacing: list[float] | None = key(None, "voxel size x y z in mm; null = the preset's, without preset as it is")
    size: list[int] | None = key(
        None, "voxels x y z, cropped around the foreground or padded; null = the preset's, without preset see multiple"
    )
    multiple: int = key(64, "without size: each axis is padded to the next multiple of it; the autoencoder's patch")
    interpolation: str = key("linear", "linear | bspline")
    # Intensities
    modality: str | None = key(None, "CT | MR; of DICOM series only those of it are taken; null = the preset's")
    window: list[float] | None = key(
        None, "lowest and highest value, mapped to -1 and 1; null = -1000 1000 HU for CT without percentiles"
    )
    percentiles: list[float] | None = key(
        None, "percentiles of each volume, mapped to -1 and 1; null = 0.5 99.5 for MR without window"
    )
    # Run
    num_workers: int = key(4, "processes, at most one per core; 0 = work in the main process")
    dry_run: bool = key(False, "list what is found, write nothing")
    # Class table
    downsample: int = key(8, "image voxels per latent voxel of the class table's grids: 8 | 4")
    classes: list[VolumeClass] = key([], "what the presets are: id, name, modality, grids and spacings of each class")


# ---------------------------------------------------------------------------------------------- autoencoder


@dataclass
class AutoencoderModelConfig:
    """Patch-Volume autoencoder: architecture, losses, optimisation and run."""

    # Architecture
    embedding_dim: int = key(8, "channels of a latent (E)")
    n_codes: int = key(8192, "vectors in the codebook")
    n_hiddens: int = key(48, "width of the first encoder level; it doubles with each downsampling but the last")
    downsample: list[int] = key([8, 8, 8], "compression per axis (z, x, y): three equal powers of two")
    norm_type: str = key("group", "normalisation layers: group | batch (synchronised over processes)")
    num_groups: int = key(24, "groups of each GroupNorm; must divide n_hiddens")
    # Codebook
    no_random_restart: bool = key(False, "true: codes that fall out of use are never restarted")
    restart_thres: float = key(1.0, "codes whose running count falls below this restart from encoder outputs")
    codebook_decay: float = key(0.99, "decay of the codebook's running averages, per training batch")
    codebook_init_step: int = key(0, "optimiser step at which the codebook starts from data; no quantisation before")
    # Losses
    disc_channels: int = key(32, "width of the discriminator's first stage")
    disc_layers: int = key(3, "strided stages of the discriminator")
    disc_loss_type: str = key("hinge", "discriminator loss: hinge | vanilla")
    discriminator_iter_start: int = key(20000, "optimiser step at which the adversarial terms start")
    volume_gan_weight: float = key(2.0, "weight of the adversarial term; 0 = no discriminator")
    gan_feat_weight: float = key(4.0, "weight of the discriminator's feature matching")
    l1_weight: float = key(4.0, "weight of the L1 reconstruction error")
    perceptual_weight: float = key(2.0, "weight of the perceptual loss; 0 = its network is never built")
    perceptual_3d: bool = key(False, "true: 3D MedicalNet features; false: 2D LPIPS on slices of the three axes")
    perceptual_weights: str | None = key(
        None, "folder with the perceptual network's weight files; null = its usual place"
    )
    # Optimisation
    stage: int = key(1, "1: patches, whole model; 2: whole volumes, decoder and post_vq_conv only")
    batch_size: int = key(24, "patches (stage 1) or volumes (stage 2) per process and step")
    lr: float = key(3e-4, "learning rate of both Adam optimisers")
    adam_betas: list[float] = key([0.5, 0.9], "Adam betas of both optimisers")
    lr_schedule: str = key("constant", "constant | cosine (to 0 over max_steps)")
    lr_warmup: int = key(0, "optimiser steps over which the learning rate rises linearly from 0")
    gradient_clip: float = key(0.0, "largest gradient norm; 0 = no clipping")
    max_steps: int = key(1_000_000, "optimiser steps after which training ends; -1 = no limit")
    max_epochs: int = key(10_000, "epochs after which training ends; -1 = no limit")
    # Run
    seed: int = key(1234, "seed of weights, data order, crops and augmentation")
    num_workers: int = key(8, "data loading processes; 0 = load in the main process")
    gpus: int = key(1, "devices of one node; on CPU the number of processes")
    accelerator: str = key("auto", "auto | cpu | gpu; auto = a GPU where there is one")
    precision: str = key("32", "32 | bf16 | 16 (mixed precision)")
    channels_last: bool = key(False, "networks and activations with the channels innermost in memory")
    compile: bool = key(False, "compile encoder, decoder and discriminator for training")
    gradient_checkpointing: bool = key(
        False, "recompute residual blocks in the backward pass: less memory, more time, same gradients"
    )
    default_root_dir: str | None = key(None, "folder that gets logs, checkpoints and the resolved config; required")
    resume_from_checkpoint: str | None = key(
        None, "checkpoint: stage 1 continues it, null = a new run; stage 2 starts from it, required"
    )
    checkpoint_every: int = key(3000, "optimiser steps between checkpoints")
    val_every: int | None = key(None, "optimiser steps between validations; null = once an epoch")
    log_every: int = key(50, "optimiser steps between logged losses")
    log_volume_every: int = key(1500, "batches between logged volumes (and at powers of two before); 0 = none")


@dataclass
class AutoencoderDataConfig:
    """Training data of the autoencoder."""

    root_dir: str | None = key(None, "JSON file: name -> folder or list of folders with *.nii.gz; required")
    image_channels: int = key(1, "channels of a volume")
    imgtype: str = key("CT", "modality, for the record only")
    patch_size: int = key(64, "edge of a patch in voxels; a multiple of model.downsample")
    intensity_range: list[float] = key([-1.0, 1.0], "lowest and highest intensity of the files")
    val_fraction: float = key(0.1, "share of the files held out for validation")
    split_seed: int = key(0, "seed of the split into training and validation files")
    subject_pattern: str | None = key(
        None, "regular expression, finds a file's subject in its path below the class folder; null = each file its own"
    )
    background_keep: float = key(1.0, "probability of keeping a patch that is nearly all background")
    augmentation: bool = key(True, "random flips and quarter turns of training data")
    cache: str = key("int16", "uncompressed copies of the volumes: int16 (2 bytes a voxel) | float32 (4, exact) | none")
    cache_dir: str | None = key(None, "folder for these copies; null = FOLDER_cache beside each folder")
    cache_limit_gb: float | None = key(None, "largest size of these copies in GB; null = what the disk holds")


@dataclass
class AutoencoderConfig:
    """Both training stages of the Patch-Volume autoencoder."""

    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    dataset: AutoencoderDataConfig = field(default_factory=AutoencoderDataConfig)


@dataclass
class LatentConfig:
    """Encoding of a data set into latents (train/generate_training_latent.py)."""

    data_path: str | None = key(None, "JSON file: class id -> folder; latents go to FOLDER_latents beside it; required")
    AE_ckpt: str | None = key(None, "autoencoder checkpoint; required")
    batch_size: int = key(4, "volumes of equal size encoded together")
    num_workers: int = key(8, "data loading processes; 0 = load in the main process")
    sliding_window: int = key(64, "patches per volume encoded at a time")
    intensity_range: list[float] | None = key(
        None, "lowest and highest intensity of the files; null = as recorded in the checkpoint, else -1 1"
    )
    device: str = key("auto", "auto | cpu | cuda; auto = a GPU where there is one")


# ------------------------------------------------------------------------------------------------ diffusion


@dataclass
class DiffusionModelConfig:
    """What makes the diffusion model; training and generation have to agree on it."""

    volume_channels: int = key(8, "channels of a latent; the autoencoder's embedding_dim")
    model_dim: int = key(72, "width of the first level; a multiple of 6 and of resnet_groups")
    dim_mults: list[int] = key([1, 1, 2, 4, 8], "width of each level as a multiple of model_dim")
    use_attn: list[int] = key([0, 0, 0, 1, 1], "1 for each level with attention")
    patch_size: int = key(1, "edge of a token in latent voxels (8x: 1, 4x: 2)")
    num_dit: int = key(1, "DiT blocks in the middle of the intra-patch flow")
    vq_size: int = key(64, "latent grid size that the resolution condition counts as 1")
    num_classes: int = key(7, "number of classes; ids are 0 ... num_classes - 1")
    resnet_groups: int = key(24, "groups of each GroupNorm")
    dit_num_heads: int = key(8, "attention heads of a DiT block")
    attn_heads: int = key(8, "attention heads of the U-Net, 32 channels each")
    timesteps: int = key(1000, "diffusion steps of the training")


@dataclass
class BiFlowNetConfig(DiffusionModelConfig):
    """Training of the latent diffusion model (train/train_BiFlowNet_SingleRes.py)."""

    # Files
    data_path: str | None = key(None, "JSON file: class id -> folder of latents; required")
    AE_ckpt: str | None = key(None, "autoencoder checkpoint, checked against the latents; null = no previews")
    results_dir: str = key("results", "folder that gets the run folders NNN-BiFlowNet")
    run_name: str | None = key(
        None, "run folder inside results_dir; null = continue the same config or start a new one"
    )
    ckpt: str | None = key(None, "BiFlowNet checkpoint to continue exactly; null = the run folder's newest, if any")
    # Model
    model: str = key("BiFlowNet", "name of the model, part of the run folder's name")
    # Diffusion
    loss_type: str = key("l1", "l1 | l2")
    label_dropout: float = key(0.0, "share of labels replaced by a null label, for guidance; 0 = no null label")
    # Optimisation
    epochs: int = key(1000, "epochs after which training ends")
    max_steps: int | None = key(None, "optimiser steps after which training ends; null = epochs alone decide")
    batch_size: int = key(16, "latents per process and step")
    lr: float = key(1e-4, "learning rate of Adam")
    adam_betas: list[float] = key([0.9, 0.999], "Adam betas")
    lr_schedule: str = key("constant", "constant | cosine (to 0 over the whole training)")
    lr_warmup: int = key(0, "optimiser steps over which the learning rate rises linearly from 0")
    grad_clip: float = key(0.0, "largest gradient norm; 0 = no clipping")
    enable_amp: bool = key(False, "mixed precision")
    amp_dtype: str = key("fp16", "type of mixed precision: fp16 (with a gradient scaler) | bf16")
    channels_last: bool = key(False, "channels-last memory layout of the network; rounding aside, nothing changes")
    compile: bool = key(False, "torch.compile of the network: minutes at first, then faster steps")
    gradient_checkpointing: bool = key(
        False, "keep less for the backward pass and compute it again: less memory, about a third more work"
    )
    ema_decay: float = key(0.995, "decay of the averaged weights")
    ema_every: int = key(10, "optimiser steps between updates of the averaged weights")
    ema_start: int = key(2000, "optimiser step before which the averaged weights are a plain copy")
    # Run
    resolution: list[int] = key([32, 32, 32], "latent grid (z, x, y); multiples of 8")
    cache: str = key("float32", "uncompressed copies of the latents, exact: float32 | none")
    cache_dir: str | None = key(None, "folder for these copies; null = FOLDER_cache beside each folder of latents")
    cache_limit_gb: float | None = key(None, "largest size of these copies in GB; null = what the disk holds")
    global_seed: int = key(0, "seed of weights, data order, noise and timesteps")
    num_workers: int = key(8, "threads that load from the cache; processes without it; 0 = load when needed")
    device: str = key("auto", "auto | cpu | cuda; auto = a GPU where there is one")
    log_every: int = key(50, "optimiser steps between logged losses")
    ckpt_every: int = key(500, "optimiser steps between checkpoints")
    keep_checkpoints: int = key(6, "newest checkpoints kept; 0 = all")
    preview: bool = key(True, "sample one volume per checkpoint into samples/")
    preview_steps: int = key(10, "DDIM steps of a preview")


@dataclass
class GenerationConfig(DiffusionModelConfig):
    """Class-conditional generation (evaluation/class_conditional_generation.py and _4x.py)."""

    # Files
    AE_ckpt: str | None = key(None, "autoencoder checkpoint; required")
    model_ckpt: str | None = key(None, "BiFlowNet checkpoint; required")
    output_dir: str | None = key(None, "folder that gets seed_S/NAME_XxYxZ.nii.gz; required")
    loss_type: str = key("l1", "l1 | l2; has no effect on sampling")
    denormalize: str | None = key(
        None, "JSON of prepared volumes (class id -> folder): writes in their units, HU or 0 ... 1; null = -1 ... 1"
    )
    output_dtype: str = key("float32", "type of the voxels: float32 | int16 (whole HU, otherwise scaled codes)")
    # Requests
    class_names: list[str] = key([], "names or ids of the classes to generate; empty = all of the table")
    resolution: list[int] | None = key(None, "voxels z y x of every volume; null = the sizes of the class table")
    spacing: list[float] | None = key(None, "voxel size x y z in mm; null = that of the class table")
    seeds: str | None = key(None, "seeds in place of seed, e.g. 0-9 (both included) or 0-3,7; null = seed alone")
    requests: str | None = key(
        None, "YAML or CSV list of requests in place of class_names: class, seed, num_samples, resolution, spacing"
    )
    # Sampling
    sampling_strategy: str = key("ddpm", "ddpm (all timesteps) | ddim | dpm++ | unipc")
    ddim_steps: int = key(100, "steps of ddim, dpm++ and unipc; at most timesteps")
    eta: float = key(0.0, "noise of ddim alone: 0 = deterministic, 1 = as much as ddpm")
    guidance_scale: float = key(
        1.0, "classifier-free guidance; 1 = off, others need a model trained with label_dropout"
    )
    seed: int = key(0, "seed of the noise")
    num_samples: int = key(1, "volumes per class, grid and seed")
    batch_size: int = key(1, "latents sampled together")
    # Speed
    precision: str = key("32", "32 | bf16 | 16: mixed precision of both networks; codes and noise schedule stay in 32")
    channels_last: bool = key(False, "channels-last memory layout of both networks; rounding aside, no image changes")
    compile: bool = key(False, "torch.compile of the diffusion network: minutes at first, then faster steps")
    device: str = key("auto", "auto | cpu | cuda; auto = a GPU where there is one")
    # Decoding
    downsample: int = key(8, "compression of the autoencoder: 8 | 4")
    decoding: str = key(
        "exact",
        "exact (as in one pass, no seams) | blended (overlapping tiles) | tiles (as the official release, seams)",
    )
    max_memory: float | None = key(
        None, "GB that decoding may take; changes no image, only time; null = 80 % of what a GPU has free, 50 % on CPU"
    )
    max_single_pass: int = key(32, "blended and tiles: latents up to this many voxels cubed are decoded whole")
    tile: int = key(256, "blended and tiles: edge of a tile in image voxels")
    classes: list[VolumeClass] = key([], "what to generate: id, name, grids and spacings of each class")


# ----------------------------------------------------------------------------------------------- evaluation


@dataclass
class EvaluationConfig:
    """What all evaluations have in common."""

    output_dir: str | None = key(None, "folder that gets the results, the pictures and the cache; required")
    cache_dir: str | None = key(None, "folder for what was computed of each volume; null = OUTPUT_DIR/cache")
    weights_dir: str | None = key(None, "folder with pretrained networks' weight files; null = torch hub's cache")
    real_range: list[float] = key([-1.0, 1.0], "lowest and highest intensity of the real files")
    exclude_unreadable: bool = key(False, "true: files that can't be read are left out and listed; false: an error")
    num_resamples: int = key(200, "resamples of the bootstrap, for 95 % intervals; at least 20")
    num_workers: int = key(4, "loading processes, at most one per core; 0 = load in the main process")
    seed: int = key(0, "seed of resamples, halvings and pairs")
    device: str = key("auto", "auto | cpu | cuda; auto = a GPU where there is one")


@dataclass
class ReconstructionConfig(EvaluationConfig):
    """How well autoencoders reconstruct volumes that they were not trained on (evaluation/reconstruction.py)."""

    data: str | None = key(None, "folder or dataset JSON of held-out volumes; required")
    AE_ckpt: list[str] = key([], "autoencoder checkpoints, e.g. of stage 1 and of stage 2, compared in this order")
    lpips: str = key("auto", "auto (where VGG-16's weight file is there) | on | off")
    max_memory: float | None = key(None, "GB that decoding may take; null = most of what is free")
    num_pictures: int = key(4, "volumes of each class in the pictures")


@dataclass
class FeatureConfig(EvaluationConfig):
    """What evaluations on features have in common."""

    networks: list[str] = key(
        ["auto"],
        "medicalnet_resnet50, imagenet_resnet50, radimagenet_resnet50, random_3d, random_2d; auto = all whose weight "
        "file is there, random ones in place of what has none",
    )
    slices: int = key(16, "slices of each plane for networks on slices; all, where a volume has fewer")
    batch_size: int = key(4, "volumes that go through a network together")
    num_halvings: int = key(10, "random halvings of the real set for the floor")
    num_pairs: int = key(100, "pairs of volumes of each set for the diversity; all, where there are fewer")


@dataclass
class GenerationMetricsConfig(FeatureConfig):
    """How near generated volumes are to real ones (evaluation/generation_metrics.py)."""

    real: str | None = key(None, "folder or dataset JSON of real volumes that were not trained on; required")
    generated: str | None = key(None, "folder (all classes may be in one) or dataset JSON; required")
    training: str | None = key(None, "folder or dataset JSON of the training volumes; null = no memorisation check")
    generated_range: list[float] | None = key(
        None, "lowest and highest intensity of generated files; null = as the JSON beside each says, else -1 1"
    )
    resample: bool = key(False, "brings all volumes to the spacing and size that most real ones of their class have")
    ignore_spacing: bool = key(False, "compares voxels whatever their size in mm and the direction of the axes")
    neighbours: int = key(5, "nearest neighbours of precision, recall, density and coverage")
    num_pictures: int = key(4, "volumes of each set and class in the pictures")


@dataclass
class ValidityConfig(FeatureConfig):
    """Whether the distances see what they should (evaluation/validity.py)."""

    real: str | None = key(None, "folder or dataset JSON of real volumes; required")
    other: str | None = key(None, "folder of volumes of another class or modality; null = another class of real")
    AE_ckpt: str | None = key(None, "autoencoder whose reconstructions are to be nearer than other; null = none")
