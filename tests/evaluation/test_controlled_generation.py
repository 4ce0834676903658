"""Controlled generation and its paired figures, with tiny random models: files in, files out, mistakes."""

import argparse
import csv
import json
import math
import re
from pathlib import Path

import generation_models as models
import numpy as np
import pytest
import torch
from reconstruction_runs import save_lpips
from report_results import shown_in
from user_errors import error_of

from common.checkpoint_files import fingerprint, load_checkpoint, save_checkpoint
from config.loading import load_config
from config.schema.control import ControlledGenerationConfig
from config.schema.evaluation import PairedMetricsConfig
from dataset.degrade import main as degrade
from dataset.hints import hints_of
from dataset.order.data_split import HELD_OUT, TRAINING, VALIDATION
from dataset.preparation.phantoms import write_phantoms
from dataset.volumes.geometry import centred_affine
from dataset.volumes.volume_io import read_header, read_volume, write_volume
from ddpm.checkpoint import load_biflownet
from ddpm.controlled import beside_controlnet
from ddpm.process import build_process
from evaluation.autoencoding.plan import load_lpips
from evaluation.controlled.paired import compared, measure
from evaluation.controlled.run import generate

IMAGE = {"name": "thick", "kind": "image", "labels": {}, "bits": False, "channels": None}
MASK = {"name": "organ", "kind": "mask", "labels": {"organ": 1}, "bits": False, "channels": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, and conditions of phantoms of 32³ (their latents are 8³)."""
    root = models.save_models(tmp_path_factory.mktemp("models"))
    for name, hint in (("image.pt", IMAGE), ("mask.pt", MASK)):
        save_controlnet(root, name, hint)
    write_phantoms(root / "phantoms", {TRAINING: 1, VALIDATION: 0, HELD_OUT: 2}, size=32, seed=0)
    data = str(root / "phantoms" / "Singleres_dataset.json")
    options = ["--data-path", data, "--output-dir", str(root / "thick"), "--classes", "0", "--num-workers", "0"]
    degrade([*options, "--operator", "thick", "--factor", "4"])
    return root


def save_controlnet(root: Path, name: str, hint: dict) -> None:
    cfg = config(root, root, model_ckpt=str(root / "none.pt"))
    torch.manual_seed(1)
    base = load_checkpoint(root / "flow.pt")
    process = build_process(config(root, root, process="diffusion", prediction="noise"))
    network = beside_controlnet(cfg, load_biflownet(cfg, root / "flow.pt"), hints_of([hint], 4), process, 1.0)
    with torch.no_grad():
        for parameter in network.part.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = network.part.state_dict()
    dropout = 0.1 if name == "image.pt" else 0.0
    args = argparse.Namespace(hints=[hint], timesteps=models.TIMESTEPS, hint_dropout=dropout)
    content = {"model": weights, "ema": weights, "args": args, "base": fingerprint(base["ema"])}
    save_checkpoint(content, root / name)


def config(root: Path, output: Path, **values):
    given = {
        "data": str(root / "thick" / "conditions.json"), "AE_ckpt": str(root / "ae.ckpt"), "output_dir": str(output),
        "base_ckpt": str(root / "flow.pt"), "model_ckpt": str(root / "image.pt"), "ddim_steps": 2, "downsample": 4,
        "device": "cpu", **models.MODEL,
    }  # fmt: skip
    return load_config(ControlledGenerationConfig, None, values={**given, **values})


def test_volumes_lie_where_their_conditions_lie(folder, tmp_path):
    paths = generate(config(folder, tmp_path, batch_size=2))
    conditions = sorted((folder / "thick" / "CTChest").glob("*.nii.gz"))
    assert [path.relative_to(tmp_path) for path in paths] == [Path("0") / file.name for file in conditions]
    for path, condition in zip(paths, conditions, strict=True):
        assert np.array_equal(read_header(path).affine, read_header(condition).affine)
        assert read_header(path).shape == read_header(condition).shape
    record = json.loads(paths[0].with_name(paths[0].name.replace(".nii.gz", ".json")).read_text())
    assert record["hints"]["thick"]["file"] == str(conditions[0])
    assert (tmp_path / "contact_sheet.png").is_file()
    roles = [[panel["role"] for panel in entry["panels"]] for entry in shown_in(tmp_path)]
    assert roles == [["condition: thick", "generated", "truth"]] * len(paths)
    # Swapped conditions give swapped volumes, of their own noise; the base alone doesn't look at them
    first = read_volume(paths[0]).data
    times = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    generate(config(folder, tmp_path))
    torch.testing.assert_close(read_volume(paths[0]).data, first, rtol=0, atol=0.05)
    assert [path.stat().st_mtime_ns for path in paths[1:]] == times[1:]
    found = error_of(generate, config(folder, tmp_path, control_scale=0.5))
    assert re.search("was generated otherwise .control_scale.: choose another output_dir", found)
    (other,) = {path.read_bytes() for path in generate(config(folder, tmp_path / "off", control_scale=0.0))[:1]}
    assert other != paths[0].read_bytes()


def test_several_samples_and_what_was_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    side = str(folder / "thick" / "conditions.json") + ":held_out"
    options = {"num_samples": 2, "data_consistency": True, "data": side, "guidance_scale": 2.0, "batch_size": 2}
    paths = generate(config(folder, tmp_path, consistency_steps=1, **options))
    last = generate(config(folder, tmp_path / "last", **{**options, "num_samples": 1}))
    assert read_volume(last[0]).data.sub(read_volume(paths[0]).data).abs().max() > 1e-3
    assert len(paths) == 4
    samples = [read_volume(path).data for path in paths[:2]]
    name = paths[0].name.removesuffix("_0.nii.gz")
    mean, std = (read_volume(paths[0].with_name(f"{name}_{what}.nii.gz")).data for what in ("mean", "std"))
    torch.testing.assert_close(mean, (samples[0] + samples[1]) / 2)
    assert std.max() > 0
    options = {
        "data": side,
        "generated": str(tmp_path),
        "AE_ckpt": str(folder / "ae.ckpt"),
        "output_dir": str(tmp_path),
    }
    results = measure(load_config(PairedMetricsConfig, None, values=options))
    of = {(figure.metric, figure.model): figure.value for figure in results.figures}
    assert of["residual of the measurements", "truth"] < 1e-3
    assert of["residual of the measurements", "generated"] < 0.1  # but for the clip to [-1, 1]
    assert of["PSNR", "generated minus condition"] == pytest.approx(of["PSNR", "generated"] - of["PSNR", "condition"])
    assert len([text for text in results.warnings if "LPIPS is left out: vgg16" in text]) == 1
    rows = list(csv.DictReader((tmp_path / "paired_volumes.csv").open()))
    assert {row["model"] for row in rows} == {"condition", "condition, agreeing", "generated", "autoencoder"}
    from config.schema.evaluation import ReportConfig
    from evaluation.report_page.report import write_report

    write_report(load_config(ReportConfig, None, values={"input_dir": str(tmp_path)}))
    text = (tmp_path / "report.html").read_text()
    assert "own truth is the nearest" in text
    assert 'href="view.html"' in text
    shown = shown_in(tmp_path)[0]
    assert shown["name"].startswith("Paired: class 0: ")
    assert [panel["role"] for panel in shown["panels"]] == ["truth", "generated", "condition"]


def test_lpips_of_a_pair(tmp_path):
    lpips = load_lpips(load_config(PairedMetricsConfig, None, values={"weights_dir": str(save_lpips(tmp_path))}))
    truth = torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    near, far = (
        compared(truth, volume.clamp(-1, 1), lpips, torch.device("cpu"))["lpips"] for volume in (truth + 0.1, -truth)
    )
    assert 0 < near < far
    for volume, network in ((truth, None), (truth[:, :15], lpips)):
        assert math.isnan(compared(volume, volume, network, torch.device("cpu"))["lpips"])


def masks(root: Path, output: Path, values: torch.Tensor) -> str:
    for file in sorted((root / "thick" / "CTChest").glob("*held_out*.nii.gz")):
        write_volume(output / "masks" / file.name, values[None].float(), centred_affine((1, 1, 1), values.shape))
    (output / "conditions.json").write_text('{"0": {"hints": {"organ": "masks"}}}')
    return str(output / "conditions.json")


def test_masks(folder, tmp_path):
    labels = torch.zeros(32, 32, 32)
    labels[8:20, 8:20, 8:20] = 1
    data = masks(folder, tmp_path, labels)
    paths = generate(config(folder, tmp_path / "out", model_ckpt=str(folder / "mask.pt"), data=data))
    assert len(paths) == 2
    # A mistake in the last one ends the run before the first is sampled
    last = sorted((tmp_path / "masks").glob("*.nii.gz"))[-1]
    for wrong, message in ((2 * labels, "label 2 is not among those of hint organ"), (0 * labels, "an empty mask")):
        write_volume(last, wrong[None], centred_affine((1, 1, 1), labels.shape))
        found = error_of(generate, config(folder, tmp_path / "b", model_ckpt=str(folder / "mask.pt"), data=data))
        assert message in found
        assert not list((tmp_path / "b").rglob("*.nii.gz"))


def test_masks_and_volumes_as_an_nnunet_data_set(folder, tmp_path):
    """By the rules of nnU-Net's documentation/dataset_format.md."""
    organs = {"organ": 3, "tumour": 7}
    hint = {**MASK, "labels": organs}
    save_controlnet(folder, "organs.pt", hint)
    labels = torch.zeros(32, 32, 32)
    labels[8:20, 8:20, 8:20] = 3
    labels[10:12, 8:20, 8:20] = 7
    data, target = masks(folder, tmp_path, labels), tmp_path / "raw" / "Dataset501_Organs"
    options = {"model_ckpt": str(folder / "organs.pt"), "data": data, "num_samples": 2, "nnunet": str(target)}
    paths = generate(config(folder, tmp_path / "out", **options))
    content = json.loads((target / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "organ": 1, "tumour": 2}
    assert content["labels_of_the_masks"] == organs
    assert list(content["channel_names"]) == ["0"]
    assert content["file_ending"] == ".nii.gz"
    cases = ["_".join(path.relative_to(tmp_path / "out").parts).removesuffix(".nii.gz") for path in paths]
    assert content["numTraining"] == len(set(cases)) == 4
    assert sorted(path.name for path in (target / "imagesTr").iterdir()) == [f"{n}_0000.nii.gz" for n in sorted(cases)]
    assert sorted(path.name for path in (target / "labelsTr").iterdir()) == [f"{n}.nii.gz" for n in sorted(cases)]
    for case, path in zip(cases, paths, strict=True):
        image, mask = target / "imagesTr" / f"{case}_0000.nii.gz", target / "labelsTr" / f"{case}.nii.gz"
        assert image.read_bytes() == path.read_bytes()
        assert read_header(image).shape == read_header(mask).shape
        assert np.array_equal(read_header(image).affine, read_header(mask).affine)
        found = read_volume(mask).data[0]
        assert found.unique().tolist() == [0, 1, 2]
        assert torch.equal(found == 2, labels == 7)
        assert torch.equal(found == 1, labels == 3)
    generate(config(folder, tmp_path / "out", **options))  # again: nothing is strange
    for change, message in (
        ({"num_samples": 1, "output_dir": str(tmp_path / "other")}, "0000.nii.gz: not of this run: name another"),
        ({"nnunet": str(tmp_path / "organs")}, "nnU-Net takes folders called DatasetNNN_NAME, as Dataset501_Lungs"),
        ({"model_ckpt": str(folder / "image.pt"), "data": str(folder / "thick" / "conditions.json")}, "one mask is"),
    ):
        found = error_of(generate, config(folder, tmp_path / "out", **{**options, **change}))
        assert message in found


def without_measurements(root: Path, folder: Path) -> dict:
    for file in (root / "thick" / "CTChest").glob("*.nii.gz"):
        (folder / "bare").mkdir(exist_ok=True)
        (folder / "bare" / file.name).write_bytes(file.read_bytes())
    (folder / "conditions.json").write_text('{"0": {"hints": {"thick": "bare"}}}')
    return {"data": str(folder / "conditions.json"), "data_consistency": True}


def other_hint(root: Path, folder: Path) -> dict:
    return {"model_ckpt": str(root / "mask.pt")}


def other_base(root: Path, folder: Path) -> dict:
    base = load_checkpoint(root / "flow.pt")
    base["ema"]["init_conv.bias"] += 1
    save_checkpoint(base, folder / "other.pt")
    return {"base_ckpt": str(folder / "other.pt")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_measurements, "data_consistency needs what was measured"),
        (lambda root, folder: {**other_hint(root, folder), "guidance_scale": 2.0}, "has no hint organ|hint_dropout"),
        (other_hint, "has no hint organ, which the ControlNet was trained with"),
        (other_base, "trained beside another BiFlowNet"),
        (lambda root, folder: {"base_ckpt": str(root / "image.pt")}, "a ControlNet, expected a BiFlowNet"),
        (lambda root, folder: {"model_ckpt": str(root / "flow.pt")}, "doesn't say which hints"),
        (
            lambda root, folder: {"data": str(root / "phantoms" / "Singleres_dataset.json")},
            "entries like .* are needed",
        ),
        (lambda root, folder: {"sampling_strategy": "euler"}, "was trained with process diffusion: choose"),
    ],
)
def test_mistakes_end_before_work(folder, tmp_path, change, message):
    found = error_of(generate, config(folder, tmp_path / "out", **change(folder, tmp_path)))
    assert re.search(message, found), found
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
