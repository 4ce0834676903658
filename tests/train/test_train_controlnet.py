"""Training of a ControlNet through the real script: the loop is that of BiFlowNet, the base stays as it is."""

import json
import re
from pathlib import Path

import biflownet_runs as runs
import pytest
import torch
from biflownet_runs import assert_same_training, crash_at
from user_errors import error_of

from common.checkpoint_files import load_checkpoint, save_checkpoint
from config.cli import parse_command_line
from config.schema.control import ControlNetConfig
from dataset.hints import hints_of
from dataset.volumes.geometry import centred_affine
from dataset.volumes.volume_io import write_latent, write_volume
from ddpm.controlled import load_controlled
from ddpm.process import build_process
from train.diffusion.run_folder import checkpoint_path
from train.train_BiFlowNet_MultiRes import train as train_base
from train.train_ControlNet import train

FLAGS = [flag for index, flag in enumerate(runs.FLAGS) if not 0 <= index - runs.FLAGS.index("--resolution") <= 3]
for name, count in (("--batch-size", 1), ("--model", 1)):
    FLAGS = [flag for index, flag in enumerate(FLAGS) if not 0 <= index - FLAGS.index(name) <= count]
SIZES = "buckets=[{grid:[8,8,8],batch_size:2},{grid:[8,8,16],batch_size:1}]"
HINTS = "hints=[{name:fbp},{name:organs,kind:mask,labels:{liver:1}}]"
FLOW = ["process=flow", "latent_scaling=unit", "loss_type=l2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two sizes of class 0, hints of both kinds; hint and latent are alike."""
    root = tmp_path_factory.mktemp("control")
    generator = torch.Generator().manual_seed(0)
    for name, grid in (("a", (8, 8, 8)), ("b", (8, 8, 16))):
        for index in range(4):
            latent = torch.rand((4, *grid), generator=generator) * 2 - 1
            write_latent(root / f"{name}_latents" / f"{index}.nii.gz", latent)
            write_latent(root / f"{name}_fbp_latents" / f"{index}.nii.gz", latent / 2)
            labels = (latent[:1] > 0).float().repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
            affine = centred_affine((1.0, 1.0, 1.0), labels.shape[1:])
            write_volume(root / f"{name}_masks" / f"{index}.nii.gz", labels, affine)
    folders = {"images": ["a_latents", "b_latents"]}
    folders["hints"] = {"fbp": ["a_fbp_latents", "b_fbp_latents"], "organs": ["a_masks", "b_masks"]}
    (root / "control.json").write_text(json.dumps({"0": folders}))
    (root / "plain.json").write_text(json.dumps({"0": folders["images"]}))
    return root / "control.json"


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    from config.schema.diffusion import BiFlowNetMultiresConfig

    command = ["--data-path", str(data.parent / "plain.json"), "--results-dir", str(tmp_path_factory.mktemp("base"))]
    command += [*FLAGS, *runs.OVERRIDES, *FLOW, SIZES, "max_steps=2", "ema_start=0"]
    cfg = parse_command_line(command, BiFlowNetMultiresConfig, "BiFlowNet_multires_8x.yaml", "")
    return checkpoint_path(train_base(cfg)["folder"], 2)


def config(data: Path, results: Path, base: Path, *overrides: str):
    command = ["--data-path", str(data), "--results-dir", str(results), "--base-ckpt", str(base), *FLAGS]
    command += [*runs.OVERRIDES, *FLOW, SIZES, HINTS, "batch_size=null", "ema_start=0", "ema_every=1", *overrides]
    return parse_command_line(command, ControlNetConfig, "ControlNet_8x.yaml", "")


def checkpoint(run: Path, step: int) -> dict:
    return load_checkpoint(checkpoint_path(run, step, "ControlNet"))


def test_it_learns_of_hints_goes_on_exactly_and_leaves_the_base(data, base, tmp_path, monkeypatch):
    options = ["lr=3e-3", "hint_dropout=0.3"]
    straight = train(config(data, tmp_path / "straight", base, *options))["folder"]
    assert straight.name == "000-ControlNet"
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config(data, tmp_path / "cut", base, *options))
    cut = train(config(data, tmp_path / "cut", base, *options))["folder"]
    saved = checkpoint(straight, 6)
    assert_same_training(saved, checkpoint(cut, 6))
    assert {"downs.0.5.weight", "mid_zero_conv.weight"} <= saved["model"].keys()
    assert not any(name.startswith(("ups", "biflownet", "final_conv")) for name in saved["model"])
    assert saved["model"]["init_conv.weight"].shape[1] == 4 + 4 + 1
    assert "channels of hints: fbp 4, organs 1" in (straight / "log.txt").read_text()

    cfg = config(data, tmp_path, base)
    file = load_checkpoint(base)
    process = build_process(cfg, file)
    hints, device = hints_of(cfg.hints, 4), torch.device("cpu")
    model = load_controlled(cfg, hints, process, (base, file), ("c.pt", saved), device)
    assert torch.equal(model.biflownet.init_conv.weight, file["ema"]["init_conv.weight"])
    assert torch.equal(model.hint_scaling.std, torch.cat([file["latent_scaling"]["std"], torch.ones(1)]))
    generator = torch.Generator().manual_seed(1)
    given = {"y": torch.tensor([0]), "res": torch.tensor([1 / 8] * 3), "time": torch.tensor([500.0])}
    x, hint = (torch.randn((1, channels, 8, 8, 8), generator=generator) for channels in (4, 5))
    assert (model(x, hint=hint, **given) - model(x, hint=-hint, **given)).abs().max() > 1e-5
    del saved["ema"], saved["base"]  # as others save them
    load_controlled(cfg, hints, process, (base, file), ("c.pt", saved), device)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hints=[]"], "hints must be one or more"),
        (["hints=[{name:zf}]"], "has no hints zf: name their folder"),
        (["hints=[{name:organs,kind:mask}]"], "a mask needs labels"),
        (["hints=[{name:organs,kind:mask,labels:{liver:0}}]"], "labels must be different whole numbers from 1 on"),
        (["hints=[{name:fbp},{name:fbp}]"], "hints must be one or more with different names"),
        (["latent_scaling=range"], "latent_scaling is range, but .* was trained with unit"),
        (["process=diffusion", "loss_type=l1"], "process is diffusion, but .* was trained with flow"),
        (["hints=[{name:organs,kind:mask,labels:{liver:2}}]"], "label 1 is not among those of hint organs"),
    ],
)
def test_mistakes_end_before_work(data, base, tmp_path, overrides, message):
    found = error_of(lambda: train(config(data, tmp_path / "results", base, *overrides)))
    assert re.search(message, found), found


def test_a_base_that_is_none(data, base, tmp_path):
    run = train(config(data, tmp_path, base, "max_steps=1"))["folder"]
    network = checkpoint_path(run, 1, "ControlNet")
    assert "a ControlNet, expected a BiFlowNet" in error_of(lambda: train(config(data, tmp_path / "b", network)))
    other = load_checkpoint(base)
    other["ema"]["init_conv.bias"] += 1
    save_checkpoint(other, tmp_path / "other.pt")
    cfg = config(data, tmp_path / "again", tmp_path / "other.pt", f"ckpt={network}", "max_steps=2")
    assert "trained beside another BiFlowNet" in error_of(lambda: train(cfg))
