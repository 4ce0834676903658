"""The scripts' command lines, the published ones word for word, and what happens to a user's mistakes."""

import errno
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import DictConfig
from torch.distributed.run import get_args_parser

from common.errors import UserError
from common.script import run_script
from config.cli import parse_command_line
from config.loading import load_config, save_config
from config.schema.autoencoder import AutoencoderConfig, LatentConfig
from config.schema.benchmark import SCHEMAS, GpuCheckConfig
from config.schema.control import ControlledGenerationConfig, ControlNetConfig
from config.schema.data import CheckConfig, DegradeConfig, PhantomConfig, PreprocessConfig, SplitConfig
from config.schema.diffusion import BiFlowNetConfig, GenerationConfig, MergeConfig
from config.schema.evaluation import (
    DemoConfig,
    DemoControlConfig,
    GenerationMetricsConfig,
    PairedMetricsConfig,
    RecipeStudyConfig,
    ReconstructionConfig,
    ReportConfig,
    SamplingStudyConfig,
    ValidityConfig,
)
from config.schema.option import options_of
from config.schema.publishing import ExportConfig

ROOT = Path(__file__).parents[2]
BIFLOWNET_COMMAND = (
    "--data-path latents.json --results-dir out --loss-type l1 --volume-channels 8 --timesteps 1000 --model-dim 72 "
    "--dim-mults 1 1 2 4 8 --use-attn 0 0 0 1 1 --patch-size 1 --num-dit 1 --enable_amp --model BiFlowNet "
    "--AE-ckpt epoch=3-step=500.ckpt --num-classes 7 --epochs 1000 --global-seed 3 --num-workers 8 --batch-size 16 "
    "--resolution 32 32 32 --log-every 50 --ckpt-every 500 --ckpt BiFlowNet_0453500.pt --vq-size 64"
)
GENERATION_COMMAND = (
    "--AE-ckpt ae.ckpt --model-ckpt BiFlowNet_0453500.pt --output-dir out --timesteps 1000 --model-dim 72 "
    "--patch-size 1 --num-dit 1 --dim-mults 1 1 2 4 8 --use-attn 0 0 0 1 1 --sampling-strategy ddim --ddim_steps 50 "
    "--num-classes 7 --loss-type l1 --volume-channels 8 --vq-size 64 --seed 5"
)


def parse_biflownet(line: str) -> DictConfig:
    return parse_command_line(line.split(), BiFlowNetConfig, "BiFlowNet_8x.yaml", "")


def test_official_biflownet_command():
    cfg = parse_biflownet(BIFLOWNET_COMMAND)
    assert (cfg.data_path, cfg.AE_ckpt, cfg.ckpt) == ("latents.json", "epoch=3-step=500.ckpt", "BiFlowNet_0453500.pt")
    assert (cfg.dim_mults, cfg.use_attn, cfg.resolution) == ([1, 1, 2, 4, 8], [0, 0, 0, 1, 1], [32, 32, 32])
    assert (cfg.enable_amp, cfg.global_seed, cfg.results_dir) == (True, 3, "out")


def test_official_generation_command():
    cfg = parse_command_line(GENERATION_COMMAND.split(), GenerationConfig, "generation_8x.yaml", "")
    assert (cfg.sampling_strategy, cfg.ddim_steps, cfg.seed, cfg.output_dir) == ("ddim", 50, 5, "out")
    assert cfg.dim_mults == [1, 1, 2, 4, 8]
    assert len(cfg.classes) == 7


def test_official_latent_command():
    line = "--data-path J --AE-ckpt C --batch-size 4"
    cfg = parse_command_line(line.split(), LatentConfig, None, "")
    assert (cfg.data_path, cfg.AE_ckpt, cfg.batch_size) == ("J", "C", 4)


def test_negative_numbers_are_values():
    cfg = parse_command_line("--intensity-range -1 1 --AE-ckpt C".split(), LatentConfig, None, "")
    assert (cfg.intensity_range, cfg.AE_ckpt) == ([-1, 1], "C")


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("--enable_amp", "enable_amp", True),
        ("--enable-amp", "enable_amp", True),
        ("--enable_amp False", "enable_amp", False),
        ("--enable_amp=false enable_amp=true", "enable_amp", False),
        ("--enable_amp lr=1", "enable_amp", True),
        ("--enable_amp lr=1", "lr", 1.0),
        ("--dim_mults 1 2 4 8 8 lr=1", "dim_mults", [1, 2, 4, 8, 8]),
        ("--dim_mults 1 2 4 8 8 lr=1", "lr", 1.0),
        ("--batch_size 3", "batch_size", 3),
        ("--batch-size=3", "batch_size", 3),
        ("--batch-size 3 batch_size=5", "batch_size", 3),
        ("batch_size=5", "batch_size", 5),
        ("lr=2 --batch-size 3 epochs=4", "epochs", 4),
        ("--max-steps 1e3", "max_steps", 1000),
        ("--AE-ckpt null=x", "AE_ckpt", "null=x"),
        ("", "patch_size", 1),
    ],
)
def test_flags_and_overrides(line, key, value):
    assert parse_biflownet(line)[key] == value


def test_flag_wins_over_config_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [BiFlowNet_4x, _self_]\nbatch_size: 2\nepochs: 3\n")
    cfg = parse_biflownet(f"--config {path} --batch-size 7")
    assert (cfg.batch_size, cfg.epochs, cfg.patch_size) == (7, 3, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch-sise 3", r"unknown flag --batch-sise, did you mean --batch-size\?"),
        ("--batch 3", r"unknown flag --batch"),
        ("--ckpt", r"argument --ckpt: expected one argument"),
        ("--batch-size many", r"option batch_size: batch_size must be a whole number, got 'many'"),
        ("--dim-mults 1 x", r"dim_mults must be a list, each item a whole number"),
        ("--enable_amp perhaps", r"enable_amp must be true or false, got 'perhaps'"),
        ("stray", r"override 'stray': expected key=value"),
        ("--config none.yaml", r"none.yaml: no such config file"),
        ("--lr 1", r"unknown flag --lr"),
    ],
)
def test_bad_command_lines(line, message, capsys):
    assert run_script(parse_biflownet, line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    with pytest.raises(UserError, match=message):
        parse_biflownet(line)


@pytest.mark.parametrize(
    "schema",
    [
        AutoencoderConfig,
        LatentConfig,
        BiFlowNetConfig,
        GenerationConfig,
        ControlNetConfig,
        ControlledGenerationConfig,
        ReconstructionConfig,
        GenerationMetricsConfig,
        ValidityConfig,
    ],
)
def test_help_shows_every_key(schema, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"], schema, None, "What the script does.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "What the script does." in text
    cfg = load_config(schema, None)
    keys = [f"{top}.{name}" for top in cfg if isinstance(cfg[top], DictConfig) for name in cfg[top]]
    keys += [top for top in cfg if not isinstance(cfg[top], DictConfig)]
    shown = {option.name: option.flag for option in options_of(schema) if option.flag}
    assert [key for key in keys if f"  {shown.get(key, key + '=')}" not in text] == []


EVALUATION_FLAGS = (
    "output-dir cache-dir weights-dir real-range subject-pattern exclude-unreadable num-resamples num-workers seed "
    "shard device "
)
BENCHMARK_FLAGS = "size repetitions json "
FEATURE_FLAGS = "networks slices batch-size num-pairs num-halvings "
# The flags of the scripts, without dashes; those of the paper's release are spelled as it has them.
PUBLISHED_FLAGS = {
    AutoencoderConfig: "continue-from set-anew",
    PreprocessConfig: "input output-dir preset name class-id select exclude assume-orientation spacing size multiple "
    "class-table subject-pattern validation held-out interpolation modality window percentiles num-workers dry-run "
    "shard",
    LatentConfig: "data-path AE-ckpt batch-size num-workers device arithmetic shard sliding-window intensity-range",
    BiFlowNetConfig: "data-path split results-dir loss-type volume-channels timesteps model-dim dim-mults use-attn "
    "patch-size num-dit enable_amp model AE-ckpt num-classes epochs global-seed num-workers batch-size resolution "
    "log-every ckpt-every ckpt vq-size max-steps run-name device arithmetic channels-last compile "
    "gradient-checkpointing continue-from set-anew init-from class-map trainable",
    GenerationConfig: "classes AE-ckpt model-ckpt output-dir timesteps model-dim patch-size num-dit dim-mults use-attn "
    "sampling-strategy ddim_steps num-classes loss-type volume-channels vq-size seed num-samples guidance-scale eta "
    "batch-size device denormalize resolution spacing seeds requests output-dtype decoding max-memory precision "
    "arithmetic channels-last compile shard class-table attributes extrapolate adapter",
    MergeConfig: "model-ckpt adapter output",
    ControlNetConfig: "data-path split base-ckpt AE-ckpt ckpt results-dir run-name model control-scale hint-dropout "
    "loss-type timesteps volume-channels model-dim dim-mults use-attn patch-size num-dit vq-size num-classes "
    "enable_amp epochs max-steps global-seed num-workers batch-size log-every ckpt-every device arithmetic "
    "channels-last compile gradient-checkpointing continue-from set-anew",
    DegradeConfig: "data-path output-dir operator classes seed num-workers views arc photons window acceleration mask "
    "noise factor axis others pattern box",
    ControlledGenerationConfig: "data AE-ckpt base-ckpt model-ckpt output-dir nnunet control-scale guidance-scale "
    "data-consistency consistency-steps sampling-strategy ddim_steps eta seed num-samples batch-size num-pictures "
    "arithmetic shard device timesteps model-dim patch-size num-dit dim-mults use-attn num-classes volume-channels "
    "vq-size",
    PairedMetricsConfig: "data generated AE-ckpt output-dir lpips weights-dir num-resamples seed device",
    ExportConfig: "ckpt output-dir licence title data results class-table",
    ReconstructionConfig: EVALUATION_FLAGS + "data AE-ckpt lpips max-memory num-pictures",
    GenerationMetricsConfig: EVALUATION_FLAGS
    + FEATURE_FLAGS
    + "real generated training generated-range resample ignore-spacing neighbours num-pictures",
    ValidityConfig: EVALUATION_FLAGS + FEATURE_FLAGS + "real other AE-ckpt",
    CheckConfig: "intensity-range patch-size subject-pattern num-workers seed num-pictures picture report",
    SplitConfig: "subject-pattern validation held-out seed anew",
    PhantomConfig: "output-dir num-per-class num-validation num-held-out slabs size seed num-workers",
    ReportConfig: "input-dir output title",
    DemoConfig: "output-dir short",
    DemoControlConfig: "demo output-dir short",
    SamplingStudyConfig: "demo output-dir strategies steps seeds num-samples device",
    RecipeStudyConfig: "output-dir device",
    GpuCheckConfig: "only minutes json size device",
    SCHEMAS["hardware"]: BENCHMARK_FLAGS + "device",
    SCHEMAS["data"]: BENCHMARK_FLAGS + "items num-workers folder",
    SCHEMAS["codebook"]: BENCHMARK_FLAGS + "ways device",
    SCHEMAS["autoencoder"]: BENCHMARK_FLAGS + "batch-size no-perceptual ways compile device",
    SCHEMAS["biflownet"]: BENCHMARK_FLAGS + "grid batch-size ways compile device",
    SCHEMAS["sample"]: BENCHMARK_FLAGS + "grid batch-size steps ways compile device",
    SCHEMAS["decode"]: BENCHMARK_FLAGS + "grid max-memory tile ways AE-ckpt latents device",
    SCHEMAS["generate"]: BENCHMARK_FLAGS + "grid steps max-memory ways compile folder device",
    SCHEMAS["write"]: BENCHMARK_FLAGS + "folder",
    SCHEMAS["scaling"]: BENCHMARK_FLAGS + "loop config processes device",
}


@pytest.mark.parametrize("schema", PUBLISHED_FLAGS, ids=lambda schema: schema.__name__)
def test_flags_are_the_published_ones(schema):
    found = {option.flag for option in options_of(schema) if option.flag}
    assert found - {"JSON", "PART"} == {f"--{name}" for name in PUBLISHED_FLAGS[schema].split()}


@pytest.mark.parametrize("words", [["--subject-pattern", r"\[a"], [r"subject_pattern=\[a"]])
def test_patterns_need_no_quotes(words):
    assert parse_command_line(["a.json", *words], CheckConfig, None, "").subject_pattern == r"\[a"


@pytest.mark.parametrize(
    "line",
    [
        "data.json --seed 3 --intensity-range -1 1",
        "--intensity-range -1 1 data.json --seed 3",
        "--seed 3 intensity_range=[-1,1] data.json",
        "json=data.json --seed 3",
    ],
)
def test_positional_arguments_stand_anywhere(line):
    cfg = parse_command_line(line.split(), CheckConfig, None, "")
    assert (cfg.json, cfg.seed, cfg.intensity_range) == ("data.json", 3, [-1, 1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--seed 3", "the following arguments are required: JSON; --help lists"),
        ("a.json b.json", "override 'b.json': expected key=value"),
    ],
)
def test_wrong_positional_arguments(line, message):
    with pytest.raises(UserError, match=message):
        parse_command_line(line.split(), CheckConfig, None, "")


@pytest.mark.parametrize(("schema", "prefix"), [(BiFlowNetConfig, ""), (AutoencoderConfig, "model.")])
def test_a_run_that_goes_on_brings_its_options(tmp_path, schema, prefix):
    """Where the command names no other file; what it gives wins."""
    save_config(load_config(schema, None, [f"{prefix}lr=0.5", f"{prefix}batch_size=3"]), tmp_path / "run")
    (tmp_path / "other.yaml").write_text("")
    options = ["--continue-from", str(tmp_path / "run"), "--set-anew", f"{prefix}batch_size=4"]
    by_key = [f"{prefix}continue_from={tmp_path / 'run'}", *options[2:]]
    for command, lr in ((options, 0.5), (by_key, 0.5), ([*options, "--config", str(tmp_path / "other.yaml")], None)):
        cfg = parse_command_line(command, schema, None, "")
        section, default = (c.model if prefix else c for c in (cfg, load_config(schema, None)))
        assert section.lr == (lr or default.lr)
        assert (section.batch_size, section.set_anew, section.continue_from) == (4, True, str(tmp_path / "run"))


@pytest.mark.parametrize("command", [["--config", ""], ["--config="], ["scaling", "--config", ""]])
def test_an_empty_config_file_name(command):
    schema = SCHEMAS["scaling"] if "scaling" in command else BiFlowNetConfig
    with pytest.raises(UserError, match="--config: the file's name is empty; name a YAML file, or leave --config out"):
        parse_command_line(command, schema, None, "")


def test_a_script_may_have_its_own_config_flag():
    cfg = parse_command_line(["scaling", "--config", "none.yaml"], SCHEMAS["scaling"], None, "")
    assert (cfg.part, cfg.config) == ("scaling", "none.yaml")


@pytest.mark.parametrize(
    ("raised", "status", "err"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (UserError("bad\nfile"), 2, "error: bad file\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/run/events"),
            2,
            "error: /run/events: nothing more can be written (No space left on device): make room and start again\n",
        ),
    ],
)
def test_run_script(raised, status, err, capsys):
    def main(argv=None):
        if isinstance(raised, BaseException):
            raise raised
        return raised

    assert run_script(main) == status
    assert capsys.readouterr().err == err


def test_run_script_keeps_our_own_faults():
    def main(argv=None):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(main)


@pytest.mark.parametrize("script", ["train_PatchVolume.py", "train_BiFlowNet_SingleRes.py"])
def test_commands_for_several_gpus_and_nodes_are_understood(script):
    """Those of docs/training.md; tests with two processes run the same scripts."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks if script in block]
    assert len(commands) == 1
    launcher, words = [], list(commands[0])
    while not words[0].endswith(".py"):
        launcher.append(words.pop(0))
    assert words[0] == f"train/{script}"
    run = get_args_parser().parse_args([*launcher[1:], *words])
    assert run.training_script_args == words[1:]
    schema = AutoencoderConfig if script == "train_PatchVolume.py" else BiFlowNetConfig
    cfg = parse_command_line(words[1:], schema, None, "")
    assert "bf16" in (cfg.model.precision if schema is AutoencoderConfig else cfg.amp_dtype)
