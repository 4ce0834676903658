"""Exported checkpoints take the place of the pickled ones bit for bit, without anybody's folders; the model card."""

import argparse
from pathlib import Path

import generation_models as models
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from report_results import GENERATION
from user_errors import error_of

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder, load_autoencoder_weights
from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.checkpoint_files import fingerprint, load_checkpoint, save_checkpoint
from config.loading import load_config
from config.schema.control import ControlledGenerationConfig
from config.schema.diffusion import BiFlowNetConfig
from config.schema.publishing import ExportConfig
from dataset.hints import hints_of
from dataset.volumes.volume_io import read_volume
from ddpm.adapter_files import write_adapter
from ddpm.checkpoint import build_biflownet, load_biflownet, load_biflownet_weights
from ddpm.controlled import beside_controlnet, load_controlled
from ddpm.process import build_process
from evaluation.generation.run import generate
from evaluation.results.results import Figure, Results
from train.diffusion.beginning import begin_biflownet
from train.publishing.exporting import export

SECRET = "/home/somebody/private"  # where files lay when they were trained
HINT = {"name": "thick", "kind": "image", "labels": {}, "bits": False, "channels": None}
AGE = {"name": "age", "range": [20.0, 80.0], "categories": [], "source": f"{SECRET}/ages.csv", "column": None}
VERSION = {"pytorch-lightning_version": "2.6.6"}
ROW = "{id: 0, name: Chest, modality: CT, grids: [[8, 16, 24]], spacings_mm: [[1, 1, 2]]}"
TABLE = f"downsample: 4\nclasses:\n- {ROW}\n"
NETWORK = load_config(
    ControlledGenerationConfig,
    None,
    values={**models.MODEL, "process": "diffusion", "prediction": "noise", "ddim_steps": 2},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """ae.ckpt, flow.pt and control.pt as trainings leave them, and in exported/ what export makes of them."""
    root = models.save_models(tmp_path_factory.mktemp("models"))
    ae = load_checkpoint(root / "ae.ckpt")
    ae["hyper_parameters"]["cfg"].dataset.root_dir = f"{SECRET}/volumes.json"
    ae["state_dict"]["perceptual_loss.weight"] = torch.ones(1)
    save_checkpoint({**ae, "optimizer_states": [{}], "global_step": 7, **VERSION}, root / "ae.ckpt")
    plain = load_checkpoint(root / "flow.pt")["model"]
    torch.manual_seed(2)
    weights = build_biflownet(NETWORK, null_label=False, attributes=[AGE]).state_dict()
    args = argparse.Namespace(
        **models.MODEL, process="diffusion", attributes=[AGE], data_path=f"{SECRET}/latents.json", resolution=[8, 8, 8]
    )
    scaling = {"mean": torch.rand(4), "std": torch.rand(4) + 0.5}
    made_by = latent_fingerprint(load_autoencoder(root / "ae.ckpt"))
    content = {"model": plain, "ema": weights, "args": args, "opt": {}, "step": 10, "autoencoder": made_by}
    save_checkpoint({**content, "latent_scaling": scaling}, root / "flow.pt")
    base = load_biflownet(NETWORK, root / "flow.pt")
    network = beside_controlnet(NETWORK, base, hints_of([HINT], 4), build_process(NETWORK), 1.0)
    args = argparse.Namespace(hints=[HINT], timesteps=models.TIMESTEPS)
    content = {"model": {}, "ema": network.part.state_dict(), "args": args, "base": fingerprint(weights)}
    save_checkpoint(content, root / "control.pt")
    (root / "table.yaml").write_text(TABLE)
    Results("generation", {}, {}, [*GENERATION, memorised()]).write(root)
    export(options(root, root / "exported"))
    return root


def memorised() -> Figure:
    return Figure("CTChest", "nearer than held-out", 0.53, (0.4, 0.66), {"generated": 50}, "real", network="MedicalNet")


def options(root: Path, output: Path, **values):
    files = {"ckpt": [str(root / name) for name in ("ae.ckpt", "flow.pt", "control.pt")], "output_dir": str(output)}
    about = {"licence": "cc-by-4.0", "data": "Phantoms.", "results": [str(root / "generation.json")]}
    values = {**files, **about, "class_table": str(root / "table.yaml"), **values}
    return load_config(ExportConfig, None, values=values)


def test_all_volumes_are_the_same(folder, tmp_path):
    new = {"AE_ckpt": str(folder / "exported/autoencoder.safetensors")}
    new["model_ckpt"] = str(folder / "exported/biflownet.safetensors")
    asked = {"attributes": ["age=30"], "class_names": ["Head"]}
    (old,) = generate(models.config(folder, tmp_path / "old", **asked))
    (made,) = generate(models.config(folder, tmp_path / "new", **asked, **new))
    assert torch.equal(read_volume(made).data, read_volume(old).data)


def test_every_loader_takes_them(folder):
    ae = folder / "exported" / "autoencoder.safetensors"
    expected = load_autoencoder(folder / "ae.ckpt").state_dict()
    torch.testing.assert_close(load_autoencoder(ae).state_dict(), expected, rtol=0, atol=0)
    lightning = patchvolumeAE.load_from_checkpoint(ae)
    expected = patchvolumeAE.load_from_checkpoint(folder / "ae.ckpt").state_dict()
    torch.testing.assert_close(lightning.state_dict(), expected, rtol=0, atol=0)  # with the discriminator
    load_autoencoder_weights(lightning, ae)  # as stage 2 begins

    found = []
    for names in (("flow.pt", "control.pt"), ("exported/biflownet.safetensors", "exported/controlnet.safetensors")):
        pair = [(folder / name, load_checkpoint(folder / name)) for name in names]
        process = build_process(NETWORK, pair[0][1])
        model = load_controlled(NETWORK, hints_of([HINT], 4), process, *pair, torch.device("cpu"))
        found.append(model.state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)

    about = {"attributes": [AGE], "latent_scaling": "unit", "init_from": str(folder / "exported/biflownet.safetensors")}
    cfg = load_config(BiFlowNetConfig, None, values={**models.MODEL, **about})
    begun, _ = begin_biflownet(cfg, build_process(cfg))
    assert fingerprint(begun.state_dict()) == fingerprint(load_checkpoint(folder / "flow.pt")["ema"])


def test_what_is_published(folder):
    assert sorted(path.name for path in (folder / "exported").iterdir()) == [
        "README.md", "autoencoder.safetensors", "biflownet.safetensors", "controlnet.safetensors"
    ]  # fmt: skip
    for path in (folder / "exported").iterdir():
        assert b"somebody" not in path.read_bytes(), path
    ae, flow = (load_checkpoint(folder / "exported" / f"{name}.safetensors") for name in ("autoencoder", "biflownet"))
    assert "perceptual_loss.weight" not in ae["state_dict"]
    assert ae["hyper_parameters"]["cfg"]["dataset"]["root_dir"] == "volumes.json"
    assert sorted(flow) == ["args", "autoencoder", "ema", "latent_scaling", "step"]
    scaling = load_checkpoint(folder / "flow.pt")["latent_scaling"]
    torch.testing.assert_close(flow["latent_scaling"], scaling, rtol=0, atol=0)


def test_the_model_card(folder, tmp_path):
    _, head, body = (folder / "exported" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "cc-by-4.0"
    for part in (
        "| 0 | Chest | CT | 64×96×32 at 1 × 1 × 2 mm |",
        "Latent grids (z × x × y) of the training: 8×8×8.",
        "age (20 to 80)",
        "thick (image)",
        "Phantoms.",
        "| CTChest | FID | random 3D CNN | 14.25 | 11 to 14.5 | 100 real, 200 generated | 3.5 (50) |",
        "| CTChest | nearer than held-out | MedicalNet | 0.53 | 0.4 to 0.66 | 50 generated |",
        '"hf://OWNER/NAME/autoencoder.safetensors"',
        "**Not intended**: diagnosis",
    ):
        assert part in body, part
    assert "Not measured" not in body
    bare = options(folder, tmp_path / "bare", ckpt=[str(folder / "flow.pt")], data=None, results=[], class_table=None)
    body = (export(bare) / "README.md").read_text()
    for part in (
        "# bare\n",
        "**Not stated by who exp",
        "2 classes, with ids 0 to 1",
        "**Not measured.** A model can",
    ):
        assert part in body, part


def test_exported_again_and_changed_bytes(folder, tmp_path):
    path = folder / "exported" / "biflownet.safetensors"
    again = export(options(folder, tmp_path / "again", ckpt=[str(path)])) / "biflownet.safetensors"
    first, second = load_checkpoint(path), load_checkpoint(again)
    assert fingerprint(first.pop("ema")) == fingerprint(second.pop("ema"))
    assert str(first) == str(second)
    content = bytearray(again.read_bytes())
    content[-3] ^= 1
    again.write_bytes(content)
    assert "damaged: its weights are no longer what was saved" in error_of(load_checkpoint, again)
    again.write_bytes(path.read_bytes().replace(b'\\"entries\\"', b'\\"entrees\\"'))
    assert "its description is damaged" in error_of(load_checkpoint, again)
    again.write_bytes(content[:-10])
    assert "not a readable checkpoint file, expected whole safetensors" in error_of(load_checkpoint, again)


def test_a_training_does_not_go_on_from_averages_alone(folder):
    path = folder / "exported" / "biflownet.safetensors"
    model = build_biflownet(NETWORK, null_label=False, attributes=[AGE])
    found = error_of(lambda: load_biflownet_weights(model, path, use_ema=False))
    assert found == f"{path}: has averaged weights alone, so no training goes on: begin one with --init-from"


def test_mistakes(folder, tmp_path):
    def message(**values) -> str:
        return error_of(lambda: export(options(folder, tmp_path / "x", **values)))

    given = OmegaConf.create(dict(lora_rank=1, lora_alpha=1.0, lora_blocks=[], num_classes=2, class_map=[]))
    write_adapter(tmp_path / "adapter.safetensors", {"weight": torch.ones(1)}, given, "base")
    other = models.save_models(tmp_path, n_codes=16) / "ae.ckpt"
    assert "required but not set: licence" in message(licence=None)
    assert "licence must be the hub's word for it" in message(licence="CC BY")
    assert f"{folder}: is there already" in message(output_dir=str(folder))
    assert "a second biflownet" in message(ckpt=[str(folder / "flow.pt")] * 2)
    assert "an adapter: give the checkpoint that it" in message(ckpt=[str(tmp_path / "adapter.safetensors")])
    assert "trained on latents of another autoencoder than" in message(ckpt=[str(other), str(folder / "flow.pt")])
    assert "trained beside another BiFlowNet than" in message(
        ckpt=[str(tmp_path / "flow.pt"), str(folder / "control.pt")]
    )
    (tmp_path / "other.json").write_text("{}")
    assert "not a result of the evaluation scripts" in message(results=[str(tmp_path / "other.json")])
    assert "is for 8x, the autoencoder compresses by 4x" in message(class_table="config/classes_8x.yaml")
    assert not (tmp_path / "x").exists()
