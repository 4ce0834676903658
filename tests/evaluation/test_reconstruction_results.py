"""Evaluation of autoencoders: files it writes, LPIPS, and mistakes."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from reconstruction_runs import (
    NUM_SCALES,
    NUM_VOLUMES,
    SIZES,
    config,
    content_of,
    figures,
    made_up,
    save_data,
    save_lpips,
    save_stages,
    table,
    write,
)
from report_results import shown_in

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.model.autoencoder import Autoencoder
from AutoEncoder.model.lpips import TriplanarLPIPS
from common.checkpoint_files import load_checkpoint, save_checkpoint
from common.errors import UserError
from common.script import run_script
from dataset.volumes.volume_io import read_header, read_volume
from evaluation.autoencoding import plan as reconstruction_checks
from evaluation.autoencoding import reconstruction
from evaluation.autoencoding import tables as reconstruction_results
from evaluation.autoencoding.measures import reconstruct
from evaluation.autoencoding.plan import short_names
from evaluation.autoencoding.reconstruction import evaluate
from evaluation.reconstruction import main
from evaluation.results.results import file_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    return save_stages(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finished(data, checkpoints, tmp_path_factory) -> Path:
    """The folder of an evaluation of both checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    evaluate(config(data, checkpoints, folder, num_pictures=1))
    return folder


@pytest.fixture(autouse=True)
def empty_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What was reconstructed, by the model's name of each call."""
    done = []
    monkeypatch.setattr(reconstruction, "reconstruct", lambda *args: done.append("volume") or reconstruct(*args))
    return done


# ------------------------------------------------------------------------------------------------------------- results


def test_results_say_what_they_are(checkpoints, finished):
    content = content_of(finished)
    assert content["settings"]["num_scales"] == NUM_SCALES
    assert [one["name"] for one in content["settings"]["checkpoints"]] == ["stage1", "stage2"]
    assert [row[1] for row in content["tables"][0]["rows"]] == checkpoints
    assert {figure["metric"] for figure in content["figures"]} == content["definitions"].keys()
    assert "LPIPS" not in content["definitions"]
    for text in ("clipped", "data range 2", "Chest 1, Head 2"):
        assert text in content["definitions"]["MS-SSIM"]
    assert "above the background" in content["definitions"]["L1, foreground"]
    few = [text for text in content["warnings"] if "few" in text]
    assert [text[:45] for text in few] == ["Chest: 3 volumes; Head: 2 volumes are few (be"]
    assert content["settings"]["device"].startswith("CPU (")
    with (finished / "reconstruction.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["figures"])
    assert float(rows[0]["std"]) == content["figures"][0]["std"]


def test_pictures_show_original_reconstructions_and_differences(finished, data, checkpoints, tmp_path, monkeypatch):
    content = content_of(finished)
    assert [one["file"] for one in content["pictures"]] == [f"pictures/reconstruction_{name}.png" for name in SIZES]
    assert all(imread(finished / one["file"]).ndim == 3 for one in content["pictures"])
    entries = shown_in(finished)
    assert [entry["name"] for entry in entries] == ["Chest: scan_0.nii.gz", "Head: scan_0.nii.gz"]
    for entry in entries:
        assert [panel["role"] for panel in entry["panels"]] == ["original", "stage1", "stage2"]
        shapes = {read_header(finished / panel["file"]).shape for panel in entry["panels"]}
        assert len(shapes) == 1
    drawn = {}
    save = reconstruction_results.save_slice_grid

    def spy(path, rows, **options):
        drawn[path.name] = (rows, options)
        return save(path, rows, **options)

    monkeypatch.setattr(reconstruction_results, "save_slice_grid", spy)
    shutil.copytree(finished / "cache", tmp_path / "cache")
    evaluate(config(data, checkpoints, tmp_path, num_pictures=1))
    rows, options = drawn["reconstruction_Head.png"]
    assert [label for label, _ in rows] == ["scan_0\noriginal", "stage1", "stage2"]
    assert len(options["columns"]) == 6  # however many checkpoints there are
    assert (options["coloured"].first_column, options["coloured"].value_range) == (3, (0, 0.5))
    original, _, stage2 = (cells for _, cells in rows)
    assert [cell.shape for cell in original] == [(24, 24), (48, 24), (48, 24)]  # z is twice as long as x and y
    assert [cell.shape for cell in stage2] == [(24, 24), (48, 24), (48, 24)] * 2
    x = read_volume(data.parent / "Head" / "scan_0.nii.gz").data
    y = load_autoencoder(checkpoints[1]).reconstruct(x[None])[0]
    np.testing.assert_allclose(original[0], x[0, 12].T.flip(0), atol=1e-6)
    np.testing.assert_allclose(stage2[0], y[0, 12].T.flip(0), atol=2e-3)
    np.testing.assert_allclose(stage2[3], (x - y)[0, 12].abs().T.flip(0), atol=2e-3)


def test_all_classes_are_summed_up_together(finished):
    """Means over the volumes of all; what a class lacks, and MS-SSIM of other scales, is left out."""
    content, found = content_of(finished), figures(finished)
    rows = [float(row["psnr"]) for row in table(finished) if row["model"] == "stage2"]
    together = found["all classes", "psnr", "stage2"]
    assert together["value"] == pytest.approx(sum(rows) / NUM_VOLUMES)
    assert (together["num"], together["no_interval"]) == ({"volumes": NUM_VOLUMES}, "n too small")  # two of Head
    assert (
        found["all classes", "codebook_usage", "stage1"]["value"] >= found["Head", "codebook_usage", "stage1"]["value"]
    )
    assert ("all classes", "ssim", "stage1") in found
    assert ("all classes", "ms_ssim", "stage1") not in found
    assert [text for text in content["warnings"] if text.startswith("all classes: MS-SSIM left out: classes differ")]


def test_a_subject_in_two_classes_is_one(data, checkpoints, finished, tmp_path):
    """Scans 0 and 1 are of people with a chest and a head, 2 of one with a chest alone."""
    shutil.copytree(finished / "cache", tmp_path / "cache")
    evaluate(config(data, checkpoints[:1], tmp_path, subject_pattern=r"scan_(\d)"))
    found, before = figures(tmp_path), figures(finished)
    together = found["all classes", "psnr", "stage1"]
    assert (together["num"], together["no_interval"]) == ({"volumes": 5, "subjects": 3}, "n too small")
    assert together["value"] == before["all classes", "psnr", "stage1"]["value"]
    assert found["Chest", "psnr", "stage1"] == before["Chest", "psnr", "stage1"]


def test_scans_of_few_subjects_are_few(data, checkpoints, finished, tmp_path):
    shutil.copytree(finished / "cache", tmp_path / "cache")
    evaluate(config(data.parent / "Chest", checkpoints[:1], tmp_path, subject_pattern="scan"))
    content = content_of(tmp_path)
    assert any(text.startswith("Chest: 3 volumes of 1 subject are few") for text in content["warnings"])
    assert {(figure["num"]["subjects"], figure["no_interval"]) for figure in content["figures"]} == {(1, "n too small")}


def test_classes_with_ids_have_the_names_of_their_folders(data, checkpoints, tmp_path):
    by_id = tmp_path / "ids.json"
    by_id.write_text(json.dumps({"0": str(data.parent / "Chest"), "7": [str(data.parent / "Head")]}))
    evaluate(config(by_id, checkpoints[:1], tmp_path, lpips="off"))
    assert {figure["group"] for figure in content_of(tmp_path)["figures"]} == {"Chest", "Head", "all classes"}


def test_any_class_name_has_a_file():
    assert file_names(["a/b", "a:b", "..", "Ä b", "x" * 300]) == ["a_b", "a_b_2", "_", "Ä_b", "x" * 50]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/stage1/checkpoints/last.ckpt", "runs/stage2/last.ckpt"], ["stage1", "stage2"]),
        (["models/AE_8x.ckpt", "models/AE_4x.ckpt"], ["AE_8x", "AE_4x"]),
        (["a/ae.ckpt", "b/ae.ckpt"], ["a", "b"]),
        (
            ["a/checkpoints/last.ckpt", "a/checkpoints/best.ckpt"],
            ["a/checkpoints/last.ckpt", "a/checkpoints/best.ckpt"],
        ),
        (["last.ckpt"], ["last"]),
    ],
)
def test_names_of_checkpoints_are_short_and_differ(paths, names):
    assert short_names(paths) == names


# --------------------------------------------------------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_lpips(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two volumes as small as LPIPS takes, and one class that is smaller."""
    folder = tmp_path_factory.mktemp("small")
    for name, size in (("fits", (16, 20, 16)), ("tiny", (10, 16, 16))):
        for i in range(2):
            write(folder / name / f"{i}.nii.gz", made_up(size, i))
    (folder / "data.json").write_text(json.dumps({"fits": "fits", "tiny": "tiny"}))
    return folder / "data.json"


def test_lpips_is_the_mean_over_all_slices(small, checkpoints, weights, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(reconstruction_checks, "LPIPS_PIXELS", 5 * 16 * 20)  # several chunks
    evaluate(config(small, checkpoints[:1], tmp_path, lpips="off"))
    assert len(calls) == 4
    assert [text for text in content_of(tmp_path)["warnings"] if "LPIPS" in text] == ["LPIPS is left out: lpips is off"]
    evaluate(config(small, checkpoints[:1], tmp_path, weights_dir=str(weights)))
    assert len(calls) == 6  # those that are too small need not be measured again
    rows = table(tmp_path)
    lpips = TriplanarLPIPS(weights).lpips
    x = read_volume(small.parent / "fits" / "0.nii.gz").data
    y = load_autoencoder(checkpoints[0]).reconstruct(x[None])[0].clamp(-1, 1)
    planes = []
    for axis in (1, 2, 3):
        pairs = zip(x.unbind(axis), y.unbind(axis), strict=True)
        planes.append(torch.stack([lpips(a[None], b[None]).squeeze() for a, b in pairs]).mean().item())
    assert float(rows[0]["lpips"]) == pytest.approx(sum(planes) / 3, rel=1e-4)
    assert [row["lpips"] for row in rows[2:]] == ["", ""]
    content = content_of(tmp_path)
    assert content["settings"]["lpips_weights"].keys() == {"vgg16-397923af.pth", "vgg.pth"}
    text = "\n".join(content["warnings"])
    assert "tiny: LPIPS left out: a volume has a side of 10 voxels, 16 are needed" in text
    assert "tiny: SSIM and MS-SSIM left out: a volume has a side of 10 voxels, 11 are needed" in text
    assert "tiny: seam index ratio of stage1 leaves out 2 of 2 volumes" in text
    assert "not torchvision's file" in text
    assert {figure["network"] for figure in content["figures"] if figure["metric"] == "LPIPS"} == {"vgg16"}


def test_lpips_without_its_weights(data, checkpoints, finished, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    content = content_of(finished)
    assert [text for text in content["warnings"] if text.startswith("LPIPS is left out: vgg16-397923af.pth is not in")]
    with pytest.raises(UserError, match=rf"^lpips is on: vgg16-397923af\.pth is not in .*{tmp_path}/hub.*weights-dir"):
        evaluate(config(data, checkpoints, tmp_path, lpips="on"))
    with pytest.raises(UserError, match="weights_dir: nowhere: no such folder"):
        evaluate(config(data, checkpoints, tmp_path, weights_dir="nowhere"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "vgg16-397923af.pth").write_bytes((weights / "vgg16-397923af.pth").read_bytes()[:500])
    with pytest.raises(UserError, match=r"lpips: .*vgg16-397923af\.pth: (truncated|not a readable) checkpoint"):
        evaluate(config(data, checkpoints, tmp_path, weights_dir=str(tmp_path / "damaged")))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "nowhere.json"}, "data: nowhere.json: no such folder or dataset JSON"),
        ({"data": f"{ROOT / 'tests' / 'golden'}"}, "the folder has no *.nii.gz file"),
        ({"data": None}, "required but not set: data"),
        ({"output_dir": None}, "required but not set: output_dir"),
        ({"AE_ckpt": []}, "required but not set: AE_ckpt"),
        ({"AE_ckpt": ["nowhere.ckpt"]}, "nowhere.ckpt: no such checkpoint file"),
        ({"max_memory": 1e-6}, "1e-06 GB are allowed: raise max_memory"),
        ({"real_range": [0.0, 1.0]}, f"{NUM_VOLUMES} volumes can't be read: "),
        ({"real_range": [0.0, 1.0]}, "declare it (real_range=[-1,"),
        ({"output_dir": f"{Path(__file__)}"}, "output_dir: "),
    ],
)
def test_mistakes_are_found_before_anything_is_reconstructed(data, checkpoints, tmp_path, calls, values, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        evaluate(config(**{"data": data, "checkpoints": checkpoints, "output_dir": tmp_path / "out", **values}))
    assert "\n" not in str(error.value)
    assert calls == []


def test_memory_that_others_took_meanwhile_is_one_line(data, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "max_bytes", lambda cfg, device: 1000)
    with pytest.raises(UserError, match=r"stage1/last\.ckpt: decoding latents .* GB are allowed: raise max_memory"):
        evaluate(config(data, checkpoints, tmp_path))


def test_the_script_ends_with_one_line(data, tmp_path, capsys):
    assert run_script(main, ["--data", str(data), "--output-dir", str(tmp_path)]) == 2
    message = "required but not set: AE_ckpt: give one or more checkpoints with --AE-ckpt FILE [FILE ...]"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_wrong_checkpoints(data, checkpoints, tmp_path, calls):
    flow = str(Path(checkpoints[0]).parent / "flow.pt")
    with pytest.raises(UserError, match="a BiFlowNet checkpoint, expected an autoencoder"):
        evaluate(config(data, [checkpoints[0], flow], tmp_path))
    with pytest.raises(UserError, match=r"last\.ckpt is given twice: name each checkpoint once"):
        evaluate(config(data, [checkpoints[0]] * 2, tmp_path))
    content = load_checkpoint(checkpoints[0])
    cfg = content["hyper_parameters"]["cfg"]
    cfg.dataset.image_channels = 3
    state = Autoencoder(cfg).state_dict()
    state["codebook.N"].fill_(1)
    save_checkpoint({**content, "state_dict": state}, tmp_path / "colour.ckpt")
    with pytest.raises(UserError, match="its volumes have 3 channels, only autoencoders of one"):
        evaluate(config(data, [str(tmp_path / "colour.ckpt")], tmp_path))
    content = load_checkpoint(checkpoints[0])
    content["state_dict"]["decoder.conv_first.bias"].fill_(math.nan)
    save_checkpoint(content, tmp_path / "diverged.ckpt")
    assert calls == []
    with pytest.raises(UserError, match=r"diverged\.ckpt: gives NaN: its training diverged"):
        evaluate(config(data, [str(tmp_path / "diverged.ckpt")], tmp_path))


@pytest.fixture
def faulty(tmp_path) -> Path:
    """A folder of two sound volumes and four that can't be used."""
    folder = tmp_path / "faulty"
    sound = [write(folder / f"sound_{i}.nii.gz", made_up((24, 24, 24), i)) for i in range(2)]
    (folder / "cut.nii.gz").write_bytes(sound[0].read_bytes()[:-2000])
    (folder / "text.nii.gz").write_text("no volume")
    volume = made_up((24, 24, 24), 2)
    volume[0, 3, 3, 3] = math.nan
    write(folder / "nan.nii.gz", volume)
    write(folder / "air.nii.gz", torch.full((1, 24, 24, 24), -1.0))
    return folder


def test_all_unreadable_files_are_named_at_once(faulty, checkpoints, tmp_path, calls):
    with pytest.raises(UserError, match=r"^4 volumes can't be read: .*--exclude-unreadable leaves") as error:
        evaluate(config(faulty, checkpoints, tmp_path / "out"))
    for name in ("cut.nii.gz: the file is truncated", "text.nii.gz: not a NIfTI", "nan.nii.gz: 1 NaN", "air.nii.gz: "):
        assert name in str(error.value)
    assert calls == []
    evaluate(config(faulty, checkpoints[:1], tmp_path / "out", exclude_unreadable=True))
    content = content_of(tmp_path / "out")
    assert [Path(one["file"]).name[:3] for one in content["excluded"]] == ["tex", "air", "cut", "nan"]
    assert "1 NaN" in content["excluded"][3]["reason"]
    assert {figure["num"]["volumes"] for figure in content["figures"]} == {2}
    assert {figure["group"] for figure in content["figures"]} == {"faulty"}


def test_too_few_volumes(faulty, checkpoints, tmp_path, calls):
    (faulty / "sound_0.nii.gz").unlink()
    with pytest.raises(UserError, match=r"faulty: 1 held-out volume, at least 2 are needed; 4 volumes can't be read: "):
        evaluate(config(faulty, checkpoints, tmp_path / "out", exclude_unreadable=True))
    for name in ("cut", "nan", "air", "text"):
        (faulty / f"{name}.nii.gz").unlink()
    with pytest.raises(UserError, match="faulty: 1 held-out volume, at least 2 are needed$"):
        evaluate(config(faulty, ["nowhere.ckpt"], tmp_path / "out"))
    assert calls == []
