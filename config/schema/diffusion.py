"""Options of BiFlowNet's training and of generation; the keys are the published flags with underscores."""

from dataclasses import dataclass, field

from config.schema.data import LARGEST_SIDE, SUB_VOLUME, VolumeClass, class_table_flag, latent_grid, voxel_size
from config.schema.option import (
    BEGINNING,
    CHANGES,
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
    inner_path,
    inner_share,
    interval,
    not_negative,
    one_of,
    positive,
    positive_triple,
    share,
    workers,
)

PREDICTIONS = ("noise", "v", "x0")  # those of ddpm/predictions.py
LOSS_WEIGHTINGS = ("none", "min_snr", "x0")  # those of ddpm/predictions.py
TIMESTEP_DRAWS = ("uniform", "logit_normal")  # those of ddpm/timesteps.py
LATENT_SCALINGS = ("range", "unit")  # those of ddpm/latent_scaling.py
TRAINABLE = ("all", "lora", "conditions")  # those of train/diffusion/beginning.py
PROCESSES = ("diffusion", "flow")  # those of ddpm/process.py
SAMPLING_STRATEGIES = ("ddpm", "ddim", "dpm++", "unipc")  # those of ddpm/samplers.py
FLOW_STRATEGIES = ("euler",)  # those of ddpm/flow.py
attribute_name = Rule(
    lambda value: value.isidentifier() and value.isascii(),
    "a name of letters, digits and _, no digit first",
)
all_positive = Rule(lambda value: all(0 < item < float("inf") for item in value), "numbers above 0")
widths = Rule(
    lambda value: len(value) > 0 and all(0 < item <= 64 for item in value) and len(value) <= 8,
    "one whole number from 1 to 64 per level, of at most 8 levels",
)
switches = Rule(lambda value: set(value) <= {0, 1}, "0 or 1 per level")
token = Rule(lambda value: value > 0 and SUB_VOLUME % value == 0, f"a divisor of the sub-volume edge {SUB_VOLUME}")


@dataclass
class Attribute:
    """One row of `attributes`: what is known of some or all volumes beside their class."""

    name: str = key("", "letters, digits and _; what generation calls it", attribute_name)
    range: list[float] | None = key(None, "of a number: its lowest and highest value", interval)
    categories: list[str] = key([], "otherwise: what there is, e.g. [F, M]")
    source: str = key(
        "volume", "volume (spacing_x, size_x, ... of the prepared volumes), or a CSV or JSON-lines file with a column "
        "file or subject"
    )  # fmt: skip
    column: str | None = key(None, "of the source; null = the name")


@dataclass
class Bucket:
    """One row of `buckets`: how latents of one size are trained on."""

    grid: list[int] = key([], "latent grid (z, x, y)", latent_grid)
    batch_size: int = key(1, "latents per process and step", batch)


@dataclass
class Replay:
    """Latents that the model could do before, trained on beside new ones, so that it does not forget them."""

    data_path: str | None = tuned(None, "JSON: class id (of this run) -> folder of latents; null = none")
    samples: int = tuned(
        0,
        "in place of data: latents of each known class and size that init_from makes of itself, once",
        between(0, 100_000),
    )
    share: float = tuned(0.5, "share of every batch that is replayed", inner_share)


@dataclass
class DiffusionModelConfig:
    """What makes the diffusion model; training and generation have to agree on it."""

    volume_channels: int = flag(8, "latent channels; the autoencoder's embedding_dim", between(1, 512), section="Model")
    model_dim: int = flag(72, "width of the first level; a multiple of 6 and of resnet_groups", between(1, 4096))
    dim_mults: list[int] = flag([1, 1, 2, 4, 8], "width of each level as a multiple of model_dim", widths)
    use_attn: list[int] = flag([0, 0, 0, 1, 1], "1 for each level with attention", switches)
    patch_size: int = flag(1, "edge of a token in latent voxels (8x: 1, 4x: 2)", token)
    num_dit: int = flag(1, "DiT blocks in the middle of the intra-patch flow", between(1, 64))
    vq_size: int = flag(64, "latent grid size that the resolution condition counts as 1", between(1, 4096))
    num_classes: int = flag(7, "number of classes; ids are 0 ... num_classes - 1", between(1, 100_000))
    resnet_groups: int = key(24, "groups of each GroupNorm", between(1, 4096))
    dit_num_heads: int = key(8, "attention heads of a DiT block", between(1, 256))
    attn_heads: int = key(8, "attention heads of the U-Net, 32 channels each", between(1, 256))
    timesteps: int = flag(
        1000,
        "diffusion steps of the training; of a flow what the network gets for t = 1",
        between(1, 100_000),
    )
    process: str = key("diffusion", "diffusion | flow (rectified flow, of velocities)", one_of(*PROCESSES))
    prediction: str = key("noise", "what the network predicts in a diffusion: noise | v | x0", one_of(*PREDICTIONS))


@dataclass
class LatentTrainingConfig(DiffusionModelConfig):
    """What training of the latent diffusion model has at one resolution and at several."""

    data_path: str | None = flag(None, "JSON: class id -> folder of latents; required", section="Files")
    split: str | None = flag(
        None,
        "split.json whose training side is trained on; null = that beside the JSON or in its folders, if there is one; "
        "none = train on all",
        resume=CHANGES,
    )
    AE_ckpt: str | None = flag(None, "autoencoder checkpoint that made the latents; null = no previews", resume=FREE)
    results_dir: str = flag("results", "folder that gets the run folders NNN-BiFlowNet", resume=FREE)
    run_name: str | None = flag(
        None, "run folder in results_dir; null = that of the same config, or a new one", inner_path, resume=FREE
    )
    ckpt: str | None = flag(None, "checkpoint that a new run goes on from exactly; null = none", resume=BEGINNING)
    continue_from: str | None = continue_from()
    set_anew: bool = set_anew()

    model: str = flag("BiFlowNet", "name of the model, part of the run folder's name", section="Model")

    loss_type: str = flag("l1", "l1 | l2", one_of("l1", "l2"), section="Diffusion", resume=CHANGES)
    loss_weighting: str = tuned(
        "none",
        "weights of losses by timestep: none | min_snr (gamma 5) | x0 (as measured in x0; not for prediction noise)",
        one_of(*LOSS_WEIGHTINGS),
    )
    timestep_draw: str = tuned(
        "uniform",
        "timesteps trained on: uniform | logit_normal (most often the middle ones)",
        one_of(*TIMESTEP_DRAWS),
    )
    latent_scaling: str = key(
        "range",
        "latents as in their files, by the codebook's range, or unit: each channel to mean 0 and variance 1",
        one_of(*LATENT_SCALINGS),
    )
    attributes: list[Attribute] = key([], "what volumes are told apart by beside their class: docs/training.md")
    attribute_dropout: float = tuned(
        0.1, "share of attributes, each and all at once, that are taken for unknown, for guidance", below_one
    )

    epochs: int = flag(1000, "epochs to train for", at_least(1), resume=EXTENDS, section="Optimisation")
    max_steps: int | None = flag(None, "optimiser steps to train; null = epochs decide", at_least(1), resume=EXTENDS)
    batch_size: int = flag(16, "latents per process and step", batch, resume=CHANGES)
    accumulate: int = key(
        1, "passes that a batch is split into, whose gradients are added: less memory, the same step", batch,
        resume=FREE,
    )  # fmt: skip
    class_weights: list[float] = tuned(
        [], "how often latents of class 0, 1, ... are taken beside those of weight 1; empty = all alike", all_positive
    )
    lr: float = tuned(1e-4, "learning rate of Adam", positive)
    adam_betas: list[float] = tuned([0.9, 0.999], "Adam betas", betas)
    lr_schedule: str = tuned(
        "constant", "constant | cosine (to 0 over the whole training)", one_of("constant", "cosine")
    )
    lr_warmup: int = tuned(0, "optimiser steps over which the learning rate rises linearly from 0", not_negative)
    grad_clip: float = tuned(0.0, "largest gradient norm; 0 = no clipping", not_negative)
    enable_amp: bool = tuned(False, "mixed precision", flag="--enable_amp")
    amp_dtype: str = tuned("fp16", "mixed precision: fp16 (with a gradient scaler) | bf16", one_of("fp16", "bf16"))
    arithmetic: str = arithmetic()
    channels_last: bool = flag(False, "channels-last memory layout; rounding aside, nothing changes", resume=FREE)
    compile: bool = flag(False, "torch.compile of the network: minutes at first, then faster steps", resume=FREE)
    gradient_checkpointing: bool = flag(
        False, "keep less for the backward pass and compute it again: less memory, about a third more work", resume=FREE
    )
    ema_decay: float = tuned(0.995, "decay of the averaged weights", below_one)
    ema_every: int = tuned(10, "optimiser steps between updates of the averaged weights", at_least(1))
    ema_start: int = tuned(2000, "optimiser step before which the averaged weights are a plain copy", not_negative)

    cache: str = key(
        "float32", "uncompressed latent copies: float32 | none", one_of("float32", "none"), resume=FREE, section="Run"
    )
    cache_dir: str | None = key(
        None, "folder of the cache; null = FOLDER_cache beside each folder of latents", resume=FREE
    )
    cache_limit_gb: float | None = key(
        None, "largest size of the cache in GB; null = what the disk holds", positive, resume=FREE
    )
    global_seed: int = flag(0, "seed of weights, data order, noise and timesteps", not_negative, resume=CHANGES)
    num_workers: int = flag(
        8,
        "threads that load from the cache; without it processes, at most one per core",
        workers,
        resume=FREE,
    )
    device: str = device_flag(EXTENDS)
    log_every: int = flag(50, "optimiser steps between logged losses", at_least(1), resume=FREE)
    logger: str = logger()
    ckpt_every: int = flag(500, "optimiser steps between checkpoints", at_least(1), resume=FREE)
    keep_checkpoints: int = keep_checkpoints()
    val_every: int = key(
        1000, "optimiser steps between held-out losses, of the split's validation side; 0 = none", not_negative,
        resume=FREE,
    )  # fmt: skip
    val_latents: int = key(
        32, "latents of each class and size that they are measured on", between(1, 100_000), resume=FREE
    )
    preview: bool = key(True, "sample one volume per checkpoint into samples/", resume=FREE)
    preview_steps: int = key(10, "DDIM or Euler steps of a preview", between(1, 100_000), resume=FREE)


@dataclass
class BiFlowNetTrainingConfig(LatentTrainingConfig):
    """What training of BiFlowNet has beside what training of a ControlNet has."""

    init_from: str | None = flag(
        None,
        "checkpoint whose averaged weights a new run begins with, optimiser and steps anew (docs/own_data.md)",
        resume=BEGINNING,
        section="Files",
    )
    class_map: list[str] = flag(
        [],
        "what classes begin as: 0=3 (class 3 of init_from), 1=new (the mean of all), 2=new:4 (class 4); of the others "
        "the same ids, or new",
        resume=BEGINNING,
    )
    trainable: str = flag(
        "all",
        "all | lora (an adapter beside frozen weights of init_from) | conditions (table of classes and attributes)",
        one_of(*TRAINABLE),
        section="Fine-tuning",
    )
    lora_rank: int = key(16, "rank of an adapter's layers", between(1, 4096))
    lora_alpha: float = key(16.0, "its strength: differences count alpha / rank times", positive)
    lora_blocks: list[str] = key([], "parts of the network that it adapts, e.g. [downs, ups]; empty = all")
    replay: Replay = field(default_factory=Replay)

    label_dropout: float = tuned(
        0.0, "share of labels replaced by a null label, for guidance; 0 = none", below_one, section="Diffusion"
    )


@dataclass
class BiFlowNetConfig(BiFlowNetTrainingConfig):
    """Training of the latent diffusion model (train/train_BiFlowNet_SingleRes.py)."""

    resolution: list[int] = flag([32, 32, 32], "latent grid (z, x, y); multiples of 8", latent_grid, section="Model")


@dataclass
class SeveralSizesConfig(LatentTrainingConfig):
    """What training on latents of several sizes has."""

    batch_size: int | None = flag(
        None,
        "latents of 32x32x32 per process and step; of other sizes as many as have the same voxels, but at least one; "
        "null = by buckets",
        batch,
        resume=CHANGES,
    )
    buckets: list[Bucket] = tuned([], "grid and batch_size of each size of latents, in place of batch_size")
    bucket_order: str = tuned(
        "turns",
        "turns (a smaller bucket starts again until the largest is through) | proportional (as often as it has data)",
        one_of("turns", "proportional"),
    )
    bucket_temperature: float = tuned(
        1.0, "proportional: above 1 the smaller buckets come more often, by batches^(1/temperature)", positive
    )


@dataclass
class BiFlowNetMultiresConfig(SeveralSizesConfig, BiFlowNetTrainingConfig):
    """Training of the latent diffusion model on latents of several sizes (train/train_BiFlowNet_MultiRes.py)."""


@dataclass
class GenerationConfig(DiffusionModelConfig):
    """Class-conditional generation (evaluation/class_conditional_generation.py and _4x.py)."""

    process: str | None = key(None, "diffusion | flow; null = as the checkpoint was trained", one_of(*PROCESSES))
    prediction: str | None = key(None, "noise | v | x0; null = as the checkpoint was trained", one_of(*PREDICTIONS))

    AE_ckpt: str | None = flag(None, "autoencoder: file or hf://OWNER/NAME/FILE[@REVISION]; required", section="Files")
    model_ckpt: str | None = flag(None, "BiFlowNet: file or hf://OWNER/NAME/FILE[@REVISION]; required")
    adapters: list[str] = key(
        [], "adapters of the model, each FILE or FILE:WEIGHT, e.g. adapter.safetensors:0.7", flag="--adapter"
    )
    output_dir: str | None = flag(None, "folder that gets seed_S/NAME_XxYxZ.nii.gz; required")
    loss_type: str = flag("l1", "l1 | l2; has no effect on sampling", one_of("l1", "l2"), section="Model")
    denormalize: str | None = flag(
        None, "JSON of prepared volumes by class: writes their units, HU or 0 to 1; null = -1 to 1", section="Files"
    )
    output_dtype: str = flag("float32", "float32 | int16 (whole HU, else scaled codes)", one_of("float32", "int16"))

    attributes: list[str] = flag(
        [],
        "values of the attributes that the model was trained with, as age=63 sex=F; those not given are unknown, but "
        "spacing and size are the volume's",
    )
    extrapolate: bool = flag(False, "scalars may lie outside the range that was trained on")
    class_names: list[str] = key(
        [], "classes by name or id; empty = all of the table", flag="--classes", section="Requests (docs/generation.md)"
    )
    resolution: list[int] | None = flag(
        None,
        "voxels z y x of every volume; null = the class table's",
        positive_triple(f"three whole numbers above 0 and up to {LARGEST_SIDE:,}, z y x in voxels", LARGEST_SIDE),
    )
    spacing: list[float] | None = flag(None, "voxel size x y z in mm; null = that of the class table", voxel_size)
    seeds: str | None = flag(None, "seeds in place of seed, e.g. 0-9 (both included) or 0-3,7; null = seed alone")
    requests: str | None = flag(
        None, "YAML or CSV list of requests in place of class_names: class, seed, num_samples, resolution, spacing"
    )

    sampling_strategy: str = flag(
        "ddpm",
        "ddpm (all timesteps) | ddim | dpm++ | unipc; of a flow euler",
        one_of(*SAMPLING_STRATEGIES, *FLOW_STRATEGIES),
        section="Sampling",
    )
    ddim_steps: int = key(
        100,
        "steps of ddim, dpm++ and unipc, at most timesteps; of euler",
        between(1, 100_000),
        flag="--ddim_steps",
    )
    eta: float = flag(0.0, "noise of ddim alone: 0 = deterministic, 1 = as much as ddpm", share)
    guidance_scale: float = flag(
        1.0, "classifier-free guidance; 1 = off, others need a model trained with label_dropout", not_negative
    )
    seed: int = flag(0, "seed of the noise", not_negative)
    num_samples: int = flag(1, "volumes per class, grid and seed", between(1, 100_000, "volumes of one run"))
    batch_size: int = flag(1, "latents sampled together", batch)

    precision: str = flag(
        "32",
        "32 | bf16 | 16: mixed precision of both networks; codes and noise schedule stay in 32",
        one_of("32", "bf16", "16"),
        section="Speed",
    )
    arithmetic: str = arithmetic()
    channels_last: bool = flag(False, "channels-last memory layout of both networks; rounding aside, no image changes")
    compile: bool = flag(False, "torch.compile of the diffusion network: minutes at first, then faster steps")
    shard: str | None = shard()
    device: str = device_flag()

    downsample: int = key(8, "compression of the autoencoder: 8 | 4", one_of(8, 4), section="Decoding")
    decoding: str = flag(
        "exact",
        "exact (as in one pass, no seams) | blended (overlapping tiles) | tiles (as the official release, seams)",
        one_of("exact", "blended", "tiles"),
    )
    max_memory: float | None = flag(
        None,
        "GB that decoding may take; changes no image, only time; null = 80 % of what a GPU has free, 50 % on CPU",
        positive,
    )
    max_single_pass: int = key(
        32, "blended, tiles: latents up to so many voxels cubed are decoded whole", between(1, 32_767)
    )
    tile: int = key(256, "blended, tiles: edge of a tile in image voxels", between(1, 32_767))
    class_table: str | None = class_table_flag()
    classes: list[VolumeClass] = key([], "class table: id, name, grids (z, x, y) and spacings_mm (x, y, z) of each")


@dataclass
class MergeConfig:
    """A BiFlowNet and adapters as one checkpoint (train/merge_adapters.py)."""

    model_ckpt: str | None = flag(None, "BiFlowNet checkpoint that the adapters were trained on; required")
    adapters: list[str] = key([], "adapters, each FILE or FILE:WEIGHT; required", flag="--adapter")
    output: str | None = flag(None, "checkpoint to write, NAME.pt or NAME.safetensors; required")
