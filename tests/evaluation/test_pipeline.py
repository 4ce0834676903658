"""The pipeline and torch.hub's entry points: the script's volumes bit for bit, from anywhere on disk."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import generation_models as models
import nibabel as nib
import numpy as np
import pytest
import torch
from hub_cache import offline_cache, put_into_cache
from user_errors import error_of

from AutoEncoder.encoding import encode
from common.checkpoint_files import load_checkpoint, save_checkpoint
from config.loading import save_config
from dataset.volumes.volume_io import read_volume, write_volume
from evaluation.generation.pipeline import Pipeline
from evaluation.generation.run import generate

ROOT = Path(__file__).parents[2]
SAMPLING = {"sampling_strategy": "ddim", "ddim_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models whose file says its network, and config.yaml with the class table."""
    root = models.save_models(tmp_path_factory.mktemp("models"))
    flow = load_checkpoint(root / "flow.pt")
    save_checkpoint({**flow, "args": argparse.Namespace(**models.MODEL)}, root / "flow.pt")
    save_config(models.config(root, root), root)
    return root


@pytest.fixture(scope="module")
def pipeline(folder) -> Pipeline:
    return Pipeline(folder / "ae.ckpt", folder / "flow.pt", folder / "config.yaml", device="cpu", **SAMPLING)


def test_generates_what_the_script_writes(folder, pipeline, tmp_path):
    asked = {"seed": 3, "num_samples": 2, "batch_size": 2}
    written = generate(models.config(folder, tmp_path, class_names=["Head", "Chest"], **asked))
    made = pipeline.generate(["Head", "1", 0][::2], **asked)  # a name, an id
    assert [volume.request.class_name for volume in made] == ["Head", "Head", "Chest", "Chest"]
    for volume, path in zip(made, written, strict=True):
        image = nib.load(path)
        assert np.array_equal(volume.array, image.get_fdata(dtype=np.float32))
        assert np.array_equal(volume.affine, image.affine)
    assert not np.array_equal(made[0].array, made[1].array)


def test_encodes_files_and_tensors_and_decodes(pipeline, tmp_path):
    data = torch.rand(1, 20, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_volume(tmp_path / "scan.nii.gz", data, np.eye(4))
    latent = pipeline.encode(tmp_path / "scan.nii.gz")
    assert torch.equal(latent, pipeline.encode(read_volume(tmp_path / "scan.nii.gz").data))
    assert torch.equal(latent, encode(pipeline.autoencoder, data))
    assert latent.shape == (4, 8, 8, 4)
    assert pipeline.decode(latent, size=(20, 32, 16)).shape == data.shape
    assert not torch.equal(pipeline.decode(latent), pipeline.decode(latent, decoding="tiles", tile=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2}, "has no null label"),
        ({"resolution": [40, 32, 32]}, "the nearest is"),
        ({"model_dim": 48}, "model_dim: an option of the pipeline, not of a call"),
        ({"output_dir": "x"}, "output_dir: an option of the script, without effect here"),
        ({"stepps": 3}, "unknown key stepps"),
        ({"precision": "16"}, "needs a GPU"),
    ],
)
def test_wrong_options_are_one_line(pipeline, options, message):
    assert message in error_of(lambda: pipeline.generate("Head", **options))


def test_class_tables_that_do_not_fit(folder, tmp_path):
    pipeline = Pipeline(folder / "ae.ckpt", folder / "flow.pt", device="cpu")  # of two classes, not the paper's
    assert "classes is empty: give a class table" in error_of(pipeline.generate, "Chest")
    config = save_config(models.config(folder, folder, downsample=8), tmp_path)
    found = error_of(lambda: Pipeline(folder / "ae.ckpt", folder / "flow.pt", config, device="cpu"))
    assert "compresses by 4x, the class table of" in found


def test_torch_hub_from_another_folder_with_names_on_the_hub(folder, pipeline, tmp_path, monkeypatch):
    """In a process of its own: torch.hub takes the folder off the path again, after the entry point."""
    put_into_cache(tmp_path / "cache", "ward/models", folder / "ae.ckpt", folder / "flow.pt")
    code = (
        "import sys, torch, numpy as np\n"
        f"load = lambda name, **options: torch.hub.load({str(ROOT)!r}, name, source='local', **options)\n"
        "ae, flow = 'hf://ward/models/ae.ckpt', 'hf://ward/models/flow.pt@main'\n"
        f"pipe = load('pipeline', AE_ckpt=ae, model_ckpt=flow, config={str(folder / 'config.yaml')!r}, device='cpu')\n"
        f"volume = pipe.generate('Head', **{SAMPLING})[0]\n"
        "np.save('volume.npy', volume.array)\n"
        "state = lambda network: [value.tolist() for value in network.state_dict().values()]\n"
        "assert state(load('autoencoder', ckpt=ae)) == state(pipe.autoencoder)\n"
        "assert state(load('biflownet', ckpt=flow)) == state(pipe.model)\n"
        "assert pipe.generate.__self__._options['model_ckpt'] == flow\n"
        "sys.modules['config'] = type(sys)('config'); sys.modules['config'].__file__ = '/elsewhere/config.py'\n"
        "try:\n    load('autoencoder', ckpt=ae)\n"
        "except ImportError as error:\n    assert 'config of /elsewhere/config.py is imported' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "volume.npy"), pipeline.generate("Head")[0].array)


def test_the_script_takes_names_on_the_hub_and_records_them(folder, tmp_path, monkeypatch):
    put_into_cache(tmp_path / "cache", "ward/models", folder / "ae.ckpt", folder / "flow.pt")
    offline_cache(monkeypatch, tmp_path / "cache")
    names = {"AE_ckpt": "hf://ward/models/ae.ckpt", "model_ckpt": "hf://ward/models/flow.pt@main"}
    (volume,) = generate(models.config(folder, tmp_path / "hub", class_names=["Head"], **names))
    (same,) = generate(models.config(folder, tmp_path / "path", class_names=["Head"]))
    assert torch.equal(read_volume(volume).data, read_volume(same).data)
    assert names["model_ckpt"] in (volume.parent / "config.yaml").read_text()
    found = error_of(generate, models.config(folder, tmp_path / "x", **{**names, "model_ckpt": names["AE_ckpt"]}))
    assert found.startswith("hf://ward/models/ae.ckpt: an autoencoder checkpoint, expected a BiFlowNet one")
