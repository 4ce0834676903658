"""Fine-tuning through the real scripts: where it begins, what trains, replay, adapters in generation."""

import json
import re
from pathlib import Path

import biflownet_runs as runs
import pytest
import torch
from biflownet_runs import assert_same_training, checkpoint, crash_at
from generation_models import MODEL, row
from omegaconf import OmegaConf
from user_errors import error_of

from common.checkpoint_files import fingerprint, load_checkpoint, save_checkpoint
from config.loading import load_config
from config.schema.diffusion import GenerationConfig, MergeConfig
from dataset.volumes.volume_io import read_latent, read_volume, write_latent
from ddpm.adapter_files import read_adapter, write_adapter
from evaluation.generation.run import generate
from train.diffusion.merging import merge_adapters
from train.train_BiFlowNet_SingleRes import train

LORA = {"trainable": "lora", "lora_rank": 2, "lora_alpha": 2.0}
NETWORK = {**MODEL, "patch_size": 1, "timesteps": 1000}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return runs.save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "ae.ckpt")


@pytest.fixture(scope="module")
def old(tmp_path_factory, autoencoder) -> Path:
    """Latents of classes 0 and 1 with their record."""
    from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder

    path = runs.make_latents(tmp_path_factory.mktemp("old"))
    runs.write_records(path, latent_fingerprint(load_autoencoder(autoencoder)))
    return path


@pytest.fixture(scope="module")
def base(old, tmp_path_factory) -> Path:
    """A checkpoint of both classes."""
    run = train(runs.config(old, tmp_path_factory.mktemp("base"), max_steps=4, ema_start=0, ema_every=1))["folder"]
    return run / "checkpoints" / "BiFlowNet_0000004.pt"


@pytest.fixture(scope="module")
def new(old, tmp_path_factory) -> Path:
    """Four latents of class 2, of the same autoencoder."""
    folder = tmp_path_factory.mktemp("new")
    generator = torch.Generator().manual_seed(9)
    for index in range(4):
        write_latent(folder / "own_latents" / f"{index}.nii.gz", torch.rand((4, 8, 8, 8), generator=generator) - 0.5)
    (folder / "own_latents" / "latents.json").write_text((old.parent / "class0_latents" / "latents.json").read_text())
    (folder / "latents.json").write_text('{"2": "own_latents"}')
    return folder / "latents.json"


def config(data: Path, results: Path, base: Path, **values):
    return runs.config(data, results, **{"init_from": str(base), "num_classes": 3, "ema_start": 0, **values})


def test_a_run_begins_with_averaged_weights_of_another_one(new, base, tmp_path):
    run = train(config(new, tmp_path, base, max_steps=1, lr=1e-30))["folder"]
    weights, began = checkpoint(run, 1), torch.load(base, weights_only=False)
    for name, value in began["ema"].items():
        if name != "cond_emb.weight":
            torch.testing.assert_close(weights["model"][name], value, rtol=0, atol=1e-6, msg=name)
            assert torch.equal(weights["ema"][name], weights["model"][name])
    torch.testing.assert_close(weights["model"]["cond_emb.weight"][2], began["ema"]["cond_emb.weight"].mean(0))
    assert (weights["step"], weights["epoch"]) == (1, 0)
    assert "class 2 is new and begins as the mean of all classes" in (run / "log.txt").read_text()


def test_conditions_alone(new, base, tmp_path):
    run = train(config(new, tmp_path, base, max_steps=2, trainable="conditions", class_map=["2=new:1"]))["folder"]
    weights, began = checkpoint(run, 2), torch.load(base, weights_only=False)["ema"]
    changed = {name for name, value in weights["model"].items() if name in began and not value.equal(began[name])}
    assert changed == {"cond_emb.weight"}
    rows = weights["model"]["cond_emb.weight"]
    assert torch.equal(rows[:2], began["cond_emb.weight"])
    assert not torch.equal(rows[2], rows[1])
    assert {name for name, value in weights["ema"].items() if not value.equal(began[name])} == changed


def test_an_adapter_trains_goes_on_exactly_and_is_used(new, base, autoencoder, tmp_path, monkeypatch):
    options = {**LORA, "lr": 0.02, "ema_decay": 0.5, "ema_every": 1}  # else six steps move no voxel to another code
    straight = train(config(new, tmp_path / "straight", base, **options))["folder"]
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config(new, tmp_path / "cut", base, **options))
    cut = train(config(new, tmp_path / "cut", base, **options))["folder"]
    assert_same_training(checkpoint(straight, 6), checkpoint(cut, 6))
    file = straight / "adapter.safetensors"
    found = read_adapter(file)
    assert (found.rank, found.num_classes) == (2, 3)
    assert {name: value.tolist() for name, value in found.weights.items()} == {
        name: value.tolist() for name, value in checkpoint(straight, 6)["ema"].items()
    }
    assert file.stat().st_size < base.stat().st_size / 10

    def make(name: str, **values) -> torch.Tensor:
        given = {"AE_ckpt": str(autoencoder), "model_ckpt": str(base), "output_dir": str(tmp_path / name)}
        given |= {**NETWORK, "sampling_strategy": "ddim", "ddim_steps": 2, "downsample": 4, "device": "cpu"}
        cfg = load_config(GenerationConfig, None, values={**given, "classes": [row(1, "Head", [8, 8, 8])], **values})
        (path,) = generate(cfg)
        made.append(path)
        return read_volume(path).data

    made: list[Path] = []
    plain = make("plain")
    adapted = make("adapted", adapters=[str(file)], num_classes=3)
    off = make("off", adapters=[f"{file}:0"], num_classes=3)
    assert torch.equal(off, plain)  # bit for bit
    assert not torch.equal(adapted, plain)
    assert json.loads(made[1].with_suffix("").with_suffix(".json").read_text())["adapters"][0][1] == 1.0

    merged = tmp_path / "merged.pt"
    options = {"model_ckpt": str(base), "adapters": [str(file)], "output": str(merged)}
    merge_adapters(load_config(MergeConfig, None, values=options))
    torch.testing.assert_close(make("merged", model_ckpt=str(merged), num_classes=3), adapted, atol=1e-3, rtol=1e-3)
    assert "is there already" in error_of(merge_adapters, load_config(MergeConfig, None, values=options))
    options["output"] = str(tmp_path / "merged.safetensors")
    tensors = load_checkpoint(merge_adapters(load_config(MergeConfig, None, values=options)))
    assert fingerprint(tensors["ema"]) == fingerprint(load_checkpoint(merged)["ema"])

    again = {"adapters": [str(file)], "num_classes": 2}
    assert re.search("num_classes is 2, but .* was trained with 3", error_of(lambda: make("other", **again)))
    other = torch.load(base, weights_only=False)
    other["ema"]["init_conv.bias"] += 1
    save_checkpoint(other, tmp_path / "other.pt")
    found = error_of(lambda: make("other", adapters=[str(file)], num_classes=3, model_ckpt=str(tmp_path / "other.pt")))
    assert "an adapter of another model" in found


def test_replay_has_its_share_of_every_batch(new, old, base, tmp_path, monkeypatch):
    from train.diffusion import training

    seen: list[int] = []
    compute = training.compute_gradients

    def noted(*arguments):
        seen.extend(arguments[6].conditions["y"].tolist())
        return compute(*arguments)

    monkeypatch.setattr(training, "compute_gradients", noted)
    options = OmegaConf.create({"data_path": str(old), "samples": 0, "share": 0.25})
    train(config(new, tmp_path, base, max_steps=28, ckpt_every=100, replay=options))
    share = sum(label < 2 for label in seen) / len(seen)
    assert {0, 1, 2} == set(seen)
    assert share == pytest.approx(0.25, abs=0.08)


def test_a_model_replays_its_own_samples(new, base, tmp_path):
    options = OmegaConf.create({"data_path": None, "samples": 2, "share": 0.5})
    run = train(config(new, tmp_path, base, max_steps=1, replay=options))["folder"]
    (folder,) = tmp_path.glob("replay-*-2")
    files = sorted(folder.rglob("*.nii.gz"))
    assert [str(file.relative_to(folder)) for file in files] == [
        f"class_{label}/8x8x8_latents/000{number}.nii.gz" for label in (0, 1) for number in (0, 1)
    ]
    latents = [read_latent(file) for file in files]
    assert all(latent.shape == (4, 8, 8, 8) and latent.isfinite().all() for latent in latents)
    assert len({latent.sum().item() for latent in latents}) == 4
    assert "4 latents are replayed, 0.5 of every batch" in (run / "log.txt").read_text()
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    train(config(new, tmp_path, base, max_steps=2, replay=options))
    torch.testing.assert_close(read_latent(files[0]), latents[0], rtol=0, atol=1e-3)  # now in a batch of its own
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_map": ["2=new:5"]}, "class 2: .* has no class 5, only 0 to 1"),
        ({"process": "flow"}, "process is flow, but .* was trained with diffusion: give process=diffusion"),
        ({"latent_scaling": "unit"}, "latent_scaling is unit, but .* was trained with range"),
        ({"vq_size": 32}, "vq_size is 32, but .* was trained with 64"),
        ({**LORA, "lora_blocks": ["up"]}, "lora_blocks: block 'up': the network has"),
        ({**LORA, "label_dropout": 0.1}, "label_dropout is 0.1, but .* has no null label, which an adapter can't add"),
        ({"batch_size": 8}, "take 8 latents a step, .* has 4; use fewer processes or a lower --batch-size"),
        ({"model_dim": 48, "dit_num_heads": 4}, "only its classes and attributes may be others: .* has shape"),
        ({"replay": {"data_path": "NEW", "samples": 0, "share": 0.5}}, "is among the new latents too"),
        ({"replay": {"data_path": "OTHER", "samples": 0, "share": 0.5}}, "latents of another autoencoder"),
    ],
)
def test_mistakes_end_before_work(new, base, tmp_path, values, message):
    values = dict(values)
    if "replay" in values:
        if values["replay"]["data_path"] == "OTHER":
            data = runs.make_latents(tmp_path / "other")
            runs.write_records(data, "0" * 64)
        else:
            data = new
        values["replay"] = OmegaConf.create({**values["replay"], "data_path": str(data)})
    found = error_of(train, config(new, tmp_path / "results", base, **values))
    assert re.search(message, found), found
    assert not (tmp_path / "results").exists()


def test_an_adapter_is_no_beginning(new, tmp_path):
    given = OmegaConf.create({**LORA, "lora_blocks": [], "num_classes": 2, "class_map": []})
    write_adapter(tmp_path / "adapter.safetensors", {"weight": torch.ones(1)}, given, "base")
    found = error_of(train, config(new, tmp_path, tmp_path / "adapter.safetensors"))
    assert "an adapter: give the checkpoint that it was trained on, or merge the two" in found


def test_latents_of_another_autoencoder_are_refused(base, tmp_path):
    data = runs.make_latents(tmp_path / "latents")
    runs.write_records(data, "0" * 64)
    found = error_of(train, config(data, tmp_path / "results", base))
    assert "was trained on latents of another autoencoder than these" in found
