"""docs/tutorial.ipynb runs from top to bottom, on tiny models that lie where the demo's do."""

import argparse
import json
from pathlib import Path

import generation_models as models
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder
from common.checkpoint_files import fingerprint, save_checkpoint
from config.loading import load_config
from config.schema.control import ControlNetConfig
from config.schema.diffusion import BiFlowNetConfig
from dataset.degrade import main as degrade
from dataset.hints import hints_of
from dataset.order.data_split import HELD_OUT, TRAINING, VALIDATION
from dataset.preparation.phantoms import write_phantoms
from ddpm.checkpoint import build_biflownet
from ddpm.controlled import beside_controlnet
from ddpm.process import build_process

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
HINT = {"name": "ct", "kind": "image", "labels": {}, "bits": False, "channels": None}


@pytest.fixture
def demo(tmp_path) -> Path:
    """What `make demo` and `make demo-control` leave, of networks of the demo's configs."""
    stage2, flow = tmp_path / "stage2" / "checkpoints", tmp_path / "biflownet" / "checkpoints"
    stage2.mkdir(parents=True)
    models.save_models(tmp_path, embedding_dim=8)
    (tmp_path / "ae.ckpt").rename(stage2 / "last.ckpt")
    cfg = load_config(BiFlowNetConfig, ROOT / "config" / "demo" / "BiFlowNet.yaml")
    base = build_biflownet(cfg, null_label=True)
    made_by = latent_fingerprint(load_autoencoder(stage2 / "last.ckpt"))
    content = {"ema": base.state_dict(), "args": argparse.Namespace(**cfg), "autoencoder": made_by}
    save_checkpoint(content, flow / "BiFlowNet_0000900.pt")

    write_phantoms(tmp_path / "phantoms", {TRAINING: 2, VALIDATION: 0, HELD_OUT: 1}, size=32, seed=0)
    data = ["--data-path", f"{tmp_path / 'phantoms' / 'Singleres_dataset.json'}", "--classes", "0"]
    degrade(
        [
            *data,
            "--output-dir",
            str(tmp_path / "control" / "ct"),
            "--operator",
            "ct",
            "--views",
            "8",
            "--num-workers",
            "0",
        ]
    )
    cfg = load_config(ControlNetConfig, ROOT / "config" / "demo" / "ControlNet.yaml")
    network = beside_controlnet(cfg, base, hints_of([HINT], 8), build_process(cfg), 1.0)
    args = argparse.Namespace(hints=[HINT], hint_dropout=0.0)
    content = {"ema": network.part.state_dict(), "args": args, "base": fingerprint(base.state_dict())}
    save_checkpoint(content, tmp_path / "control/ct/controlnet/checkpoints/ControlNet_0000250.pt")
    return tmp_path


def test_the_notebook_runs_from_top_to_bottom(demo, monkeypatch, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setenv("DEMO_DIR", str(demo))
    monkeypatch.setattr(plt, "show", lambda: None)
    matplotlib.use("agg")
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    drawn = plt.get_fignums()
    plt.close("all")
    assert len(drawn) == 7
    assert "latent (8, 8, 8, 8)" in capsys.readouterr().out
    assert [volume.values.shape for volume in names["generated"]] == [(1, 64, 64, 64), (1, 32, 64, 64), (1, 64, 64, 64)]
    torch.testing.assert_close(names["between"]["1"], names["pipeline"].decode(names["ends"][1]))
    assert names["following"].shape == (1, 32, 32, 32)


def test_the_notebook_is_small_and_without_outputs():
    assert NOTEBOOK.stat().st_size < 300_000
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])
