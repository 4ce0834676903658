"""What a configuration may hold: ranges, keys that must be set, and what a resumed run may change."""

import pytest
from user_errors import error_of

from common.errors import UserError
from config.loading import CONFIG_FOLDER, load_config, require
from config.schema.autoencoder import AutoencoderConfig, LatentConfig
from config.schema.control import ControlledGenerationConfig, ControlNetConfig
from config.schema.data import PreprocessConfig
from config.schema.diffusion import BiFlowNetConfig, GenerationConfig
from config.schema.evaluation import GenerationMetricsConfig
from config.schema.option import BEGINNING, CHANGES, EXTENDS, FREE, options_of

BAD_VALUES = [
    (AutoencoderConfig, "model.batch_size=0", "model.batch_size must be at least 1, got 0"),
    (
        AutoencoderConfig,
        "model.seed=4294967296",
        "model.seed must be of whole numbers up to 4,294,967,295, got 4294967296",
    ),
    (
        AutoencoderConfig,
        "dataset.patch_size=4096",
        r"dataset.patch_size must be at most 512 \(the largest volumes\)",
    ),
    (AutoencoderConfig, "model.disc_layers=40", "model.disc_layers must be at most 8 "),
    (AutoencoderConfig, "model.num_workers=9999", "model.num_workers must be at most 256, got 9999"),
    (
        AutoencoderConfig,
        "dataset.subject_pattern=" + "(" * 5000 + ")" * 5000,
        "dataset.subject_pattern must be a regular",
    ),
    (PreprocessConfig, "size=[100000,8,8]", "size must be three numbers above 0 and up to 32,767"),
    (
        PreprocessConfig,
        "size=[30000,30000,30000]",
        "size must be a size whose voxels, of 16 bytes each at work, fit into",
    ),
    (PreprocessConfig, "spacing=[1e-9,1,1]", "spacing must be three numbers from 0.05 to 20, x y z in mm"),
    (GenerationConfig, "seed=18446744073709551616", "seed must be of whole numbers up to 4,294,967,295, got 184467440"),
    (GenerationConfig, "resolution=[8,8,1" + "0" * 400 + "]", "resolution must be of whole numbers up to"),
    (GenerationConfig, "timesteps=1e12", "timesteps must be of whole numbers up to"),
    (GenerationConfig, "seed=" + "9" * 5000, "override 'seed=99.*: expected key=value, .*value has 5000 digits"),
    (BiFlowNetConfig, "dim_mults=[1,1,1000,4,8]", "dim_mults must be one whole number from 1 to 64 per level"),
    (GenerationMetricsConfig, "num_resamples=1000000000", r"num_resamples must be at most 10,000 \(more change no"),
    (AutoencoderConfig, "model.gpus=0", "model.gpus must be at least 1"),
    (AutoencoderConfig, "model.num_workers=-1", "model.num_workers must be at least 0"),
    (AutoencoderConfig, "model.max_steps=-2", "model.max_steps must be at least -1"),
    (AutoencoderConfig, "model.precision=64", r"model.precision must be one of 32 \| bf16 \| 16, got '64'"),
    (AutoencoderConfig, "model.lr=0", "model.lr must be above 0"),
    (AutoencoderConfig, "model.lr=nan", "model.lr must be above 0"),
    (AutoencoderConfig, "model.lr=inf", "model.lr must be above 0"),
    (AutoencoderConfig, "model.downsample=[8,8,4]", "model.downsample must be three equal powers of two"),
    (AutoencoderConfig, "model.downsample=[6,6,6]", "model.downsample must be three equal powers of two"),
    (AutoencoderConfig, "model.downsample=[8,8]", "model.downsample must be three equal powers of two"),
    (AutoencoderConfig, "model.downsample=[1,1,1]", "model.downsample must be three equal powers of two"),
    (AutoencoderConfig, "dataset.patch_size=60", "dataset.patch_size must be a multiple of model.downsample 8, got 60"),
    (AutoencoderConfig, "model.num_groups=5", "model.num_groups must divide model.n_hiddens 48, got 5"),
    (AutoencoderConfig, "model.stage=3", r"model.stage must be one of 1 \| 2"),
    (AutoencoderConfig, "model.norm_type=layer", "model.norm_type must be one of"),
    (AutoencoderConfig, "model.disc_loss_type=ls", "model.disc_loss_type must be one of"),
    (AutoencoderConfig, "model.lr_schedule=step", "model.lr_schedule must be one of"),
    (AutoencoderConfig, "model.accelerator=tpu", "model.accelerator must be one of"),
    (AutoencoderConfig, "model.codebook_decay=1", "model.codebook_decay must be at least 0 and below 1"),
    (AutoencoderConfig, "model.adam_betas=[0.5]", "model.adam_betas must be two numbers"),
    (AutoencoderConfig, "dataset.val_fraction=1.5", "dataset.val_fraction must be at least 0 and below 1"),
    (AutoencoderConfig, "dataset.background_keep=-0.1", "dataset.background_keep must be between 0 and 1"),
    (AutoencoderConfig, "dataset.intensity_range=[1,0]", "dataset.intensity_range must be two numbers, the lower one"),
    (AutoencoderConfig, "dataset.subject_pattern=sub-(", r"dataset.subject_pattern must be .*, got 'sub-\('"),
    (AutoencoderConfig, "dataset.cache=off", r"dataset.cache must be one of int16 \| float32 \| none"),
    (AutoencoderConfig, "dataset.cache_limit_gb=0", "dataset.cache_limit_gb must be above 0"),
    (LatentConfig, "sliding_window=0", "sliding_window must be at least 1"),
    (BiFlowNetConfig, "loss_type=l3", r"loss_type must be one of l1 \| l2"),
    (BiFlowNetConfig, "resolution=[32,32,30]", "resolution must be three positive multiples of 8"),
    (BiFlowNetConfig, "patch_size=3", "patch_size must be a divisor of the sub-volume edge 8"),
    (BiFlowNetConfig, "use_attn=[0,1]", "use_attn must have one entry per level"),
    (BiFlowNetConfig, "use_attn=[0,0,0,2,1]", "use_attn must be 0 or 1 per level"),
    (BiFlowNetConfig, "dim_mults=[1,1,0,4,8]", "dim_mults must be one whole number from 1 to 64 per level"),
    (BiFlowNetConfig, "amp_dtype=fp8", "amp_dtype must be one of"),
    (BiFlowNetConfig, "label_dropout=1", "label_dropout must be at least 0 and below 1"),
    (BiFlowNetConfig, "preview_steps=2000", "preview_steps must be at most timesteps 1000"),
    (BiFlowNetConfig, "device=tpu", "device must be one of"),
    (GenerationConfig, "sampling_strategy=dpm", r"sampling_strategy must be one of ddpm \| ddim \| dpm\+\+ \| unipc"),
    (GenerationConfig, "eta=2", "eta must be between 0 and 1"),
    (GenerationConfig, "downsample=16", r"downsample must be one of 8 \| 4"),
    (GenerationConfig, "num_classes=6", r"classes\[6\]: id must be below num_classes 6"),
    (
        GenerationConfig,
        "classes=[{id:0,name:a/b,grids:[[8,8,8]],spacings_mm:[[1,1,1]]}]",
        r"classes\[0\]: name must be",
    ),
    (GenerationConfig, "classes=[{id:0,name:a,grids:[[8,8]],spacings_mm:[[1,1,1]]}]", r"classes\[0\]: grids must be"),
    (GenerationConfig, "classes=[{id:0,name:a,grids:[[8,8,8]],spacings_mm:[[1,1,0]]}]", r"\[0\]: spacings_mm must be"),
    (
        GenerationConfig,
        "classes=[{id:0,name:a,grids:[[8,8,8]],spacings_mm:[]}]",
        "spacings_mm must have one entry per grid",
    ),
    (GenerationConfig, "classes=[{nam:a}]", r"unknown key classes\[0\].nam, did you mean name\?"),
]
DEFAULT_FILES = {BiFlowNetConfig: "BiFlowNet_8x.yaml", GenerationConfig: "generation_8x.yaml"}


@pytest.mark.parametrize(("schema", "override", "message"), BAD_VALUES, ids=lambda value: str(value)[:60])
def test_values_out_of_range(schema, override, message):
    path = CONFIG_FOLDER / DEFAULT_FILES[schema] if schema in DEFAULT_FILES else None
    with pytest.raises(UserError, match=message):
        load_config(schema, path, [override])


@pytest.mark.parametrize("strategy", ["ddim", "dpm++", "unipc"])
def test_ddim_steps_are_bounded_where_they_count(strategy):
    path = CONFIG_FOLDER / "generation_8x.yaml"
    with pytest.raises(UserError, match="ddim_steps must be at most timesteps 50, got 100"):
        load_config(GenerationConfig, path, ["timesteps=50", f"sampling_strategy={strategy}"])
    assert load_config(GenerationConfig, path, ["timesteps=50", "sampling_strategy=ddpm"]).timesteps == 50


def test_last_steps_of_data_consistency():
    for options, message in (
        (["consistency_steps=2"], "consistency_steps 2 needs data_consistency"),
        (["consistency_steps=9", "data_consistency=true", "ddim_steps=8"], "at most the 8 sampling steps, got 9"),
    ):
        assert message in error_of(load_config, ControlledGenerationConfig, None, options)
    options = ["consistency_steps=9", "data_consistency=true", "ddim_steps=8", "sampling_strategy=ddpm"]
    assert load_config(ControlledGenerationConfig, None, options).consistency_steps == 9


def test_all_problems_are_reported_together():
    overrides = [
        "model.batch_size=0",
        "model.lr=-1",
        "dataset.val_fraction=2",
        "model.lr_schedule=cosine",
        "model.max_steps=-1",
    ]
    message = error_of(load_config, AutoencoderConfig, None, overrides)
    assert [part.split(" must")[0] for part in message.split("; ")] == [
        "model.batch_size", "model.lr", "dataset.val_fraction", "model.max_steps",
    ]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), [("prediction", "x0"), ("loss_weighting", "min_snr")])
def test_options_that_a_flow_has_not(option, value):
    load_config(BiFlowNetConfig, None, ["process=flow", "timestep_draw=logit_normal"])
    message = error_of(load_config, BiFlowNetConfig, None, ["process=flow", f"{option}={value}"])
    assert message.startswith(f"{option} {value} has no meaning with process flow, which predicts the velocity")


def test_same_class_twice_is_refused():
    row = "{id:0,name:a,grids:[[8,8,8]],spacings_mm:[[1,1,1]]}"
    named_twice = f"classes=[{row},{row.replace('id:0', 'id:1')}]"
    assert "different names" in error_of(load_config, PreprocessConfig, None, [named_twice])
    assert "different ids" in error_of(load_config, GenerationConfig, None, [f"classes=[{row},{row}]"])


def test_require_names_every_missing_key():
    cfg = load_config(BiFlowNetConfig, None, ["ckpt=x"])
    require(cfg, "ckpt", "lr")
    message = error_of(require, cfg, "data_path", "ckpt", "AE_ckpt")
    assert "data_path (--data-path VALUE)" in message
    assert "AE_ckpt (--AE-ckpt VALUE)" in message
    assert "ckpt (--ckpt" not in message
    assert "dataset.root_dir" in error_of(require, load_config(AutoencoderConfig, None), "dataset.root_dir")


# -------------------------------------------------------------------------------------------------- resuming

# Everything else is of the data or the networks, and makes another run.
CONTINUABLE = [
    (
        BiFlowNetConfig,
        FREE,
        "AE_ckpt results_dir run_name set_anew num_workers arithmetic channels_last compile gradient_checkpointing "
        "cache cache_dir cache_limit_gb log_every ckpt_every keep_checkpoints preview preview_steps accumulate "
        "val_every val_latents logger",
    ),
    (BiFlowNetConfig, EXTENDS, "epochs max_steps device"),
    (BiFlowNetConfig, BEGINNING, "ckpt continue_from init_from class_map"),
    (
        BiFlowNetConfig,
        CHANGES,
        "loss_type loss_weighting timestep_draw label_dropout batch_size lr adam_betas lr_schedule lr_warmup grad_clip "
        "enable_amp amp_dtype ema_decay ema_every ema_start global_seed split class_weights attribute_dropout "
        "replay.data_path replay.samples replay.share",
    ),
    (
        AutoencoderConfig,
        FREE,
        "model.num_workers model.oversubscribe model.accelerator model.checkpoint_every model.keep_checkpoints "
        "model.val_every model.val_volumes model.log_every model.log_volume_every model.arithmetic model.channels_last "
        "model.compile model.gradient_checkpointing model.perceptual_weights model.default_root_dir model.set_anew "
        "dataset.imgtype dataset.cache dataset.cache_dir dataset.cache_limit_gb model.logger",
    ),
    (AutoencoderConfig, EXTENDS, "model.max_steps model.max_epochs model.gpus"),
    (AutoencoderConfig, BEGINNING, "model.resume_from_checkpoint model.continue_from"),
    (
        AutoencoderConfig,
        CHANGES,
        "model.no_random_restart model.restart_thres model.codebook_decay model.codebook_init_step "
        "model.disc_loss_type model.discriminator_iter_start model.volume_gan_weight model.gan_feat_weight "
        "model.l1_weight model.perceptual_weight model.perceptual_3d model.batch_size model.lr model.adam_betas "
        "model.lr_schedule model.lr_warmup model.gradient_clip model.seed model.precision dataset.background_keep "
        "dataset.augmentation",
    ),
]


@pytest.mark.parametrize(("schema", "resume", "keys"), CONTINUABLE)
def test_what_a_run_may_change_when_it_goes_on(schema, resume, keys):
    assert {option.name for option in options_of(schema) if option.resume is resume} == set(keys.split())


@pytest.mark.parametrize("name", ["/tmp/run", "..", "../run", "a/../../b", ".", "./", "a\0b"])
def test_run_name_stays_in_results_dir(name):
    message = error_of(load_config, BiFlowNetConfig, None, [], {"run_name": name})
    assert "run_name must be a path inside its folder, got" in message


@pytest.mark.parametrize("name", ["mine", "a/b", "v1..2", ".hidden", "./mine", ""])
def test_run_names(name):
    assert load_config(BiFlowNetConfig, None, [], {"run_name": name}).run_name == name


def test_a_mapping_is_described():
    message = error_of(load_config, ControlNetConfig, None, [], {"hints": [{"name": "a", "labels": {"liver": "x"}}]})
    assert message == "option hints: hints[0].labels must be names, each with a whole number, got {'liver': 'x'}"
