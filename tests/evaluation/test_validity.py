"""The harness on volumes whose faults are known: phantoms, and features that see nothing."""

import logging

import pytest
import torch
import torch.nn.functional as F
from evaluation_sets import validity_config, write_json, write_set
from generation_models import save_models

from AutoEncoder.checkpoint import load_autoencoder
from common.errors import UserError
from dataset import phantoms
from dataset.volumes.volume_io import read_volume
from evaluation.comparison import validity
from evaluation.comparison.degradations import DEGRADATIONS, NOISE, Degraded, ReconstructedFeatures
from evaluation.comparison.networks import RandomFeatures, VolumeFeatures
from evaluation.comparison.sets import SetVolume
from evaluation.results.results import read_results
from evaluation.validity import main

FEW_PAIRS = ("--num-pairs", "3")  # for tests that look at other figures
FAST = "--num-workers 0 --device cpu --num-resamples 40 --num-halvings 4 --slices 4 --num-pairs 30".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Phantoms of two classes, 12 each."""
    folder = tmp_path_factory.mktemp("phantoms")
    counts = "--num-per-class 12 --num-validation 0 --num-held-out 0".split()
    phantoms.main(["--output-dir", str(folder), *counts, "--size", "48"])
    return folder


class Coarse(torch.nn.Module):
    """An autoencoder's part: halves the resolution and doubles it again."""

    def reconstruct(self, volume):
        return F.interpolate(F.avg_pool3d(volume, 2), scale_factor=2, mode="trilinear")


@pytest.fixture
def autoencoder(monkeypatch, tmp_path):
    """A checkpoint that is read as `Coarse`."""
    monkeypatch.setattr(validity, "load_autoencoder", lambda path, device: Coarse())
    (tmp_path / "ae.ckpt").write_text("coarse")
    return tmp_path / "ae.ckpt"


def run(tmp_path, real, *more) -> tuple[int, dict]:
    status = main(["--real", str(real), "--output-dir", str(tmp_path / "out"), *FAST, *map(str, more)])
    return status, read_results(tmp_path / "out" / "validity.json")


def test_distances_see_what_they_should(tmp_path, made, autoencoder, caplog):
    with caplog.at_level(logging.INFO):
        status, results = run(tmp_path, made / "PatchVolume_data.json", "--AE-ckpt", autoencoder)
    (table,) = results["tables"]
    assert status == 0, [row for row in table["rows"] if row[-1] != "holds"]
    assert len(table["rows"]) == 2 * (2 * 4 + 2 + 1)  # classes; networks; memorisation of one; diversity
    assert results["warnings"] == []
    found = {(f["group"], f["network"], f["metric"]): f["value"] for f in results["figures"]}
    for name in ("CTChest", "MRBrain"):
        for network in ("random_3d", "random_2d"):
            other, coarse, real = (
                found[name, network, f"FID of a half: {what}"] for what in ("other", "reconstructed", "real")
            )
            assert other > 2 * real
            assert other > coarse > real
            for kind, levels, _ in DEGRADATIONS:
                values = [found[name, network, f"FID to itself: {kind} {level:g}"] for level in levels]
                assert values == sorted(set(values))
                assert 0 < values[0] < real < values[-1] / 4
    assert len(results["curves"]) == 8
    assert results["curves"][0]["series"][0]["x"] == [0, *NOISE]
    assert {tuple(figure["num"].items()) for figure in results["figures"]} == {(("of each", 6),), (("real", 12),)}


def test_features_that_see_nothing_fail_the_checks(tmp_path, made, monkeypatch, caplog):
    class Size(torch.nn.Module):
        def forward(self, volumes):
            rng = torch.Generator().manual_seed(len(volumes))
            return torch.rand(len(volumes), 2, generator=rng)

    blind = VolumeFeatures("random_blind", "", Size(), {})
    monkeypatch.setattr(validity, "build_networks", lambda *args: [blind])
    status, results = run(tmp_path, made / "PatchVolume_data.json")
    failed = {row[2] for row in results["tables"][0]["rows"] if row[-1] == "FAILS"}
    assert status == 1
    assert failed >= {"more noise is farther", "more blur is farther"}
    assert sum("check failed" in warning for warning in results["warnings"]) >= 2


def test_a_class_is_compared_with_the_folder_that_is_given(tmp_path, made, monkeypatch):
    status, results = run(
        tmp_path,
        made / "CTChest",
        "--other",
        made / "MRBrain",
        "--networks",
        "random_3d",
        "--num-halvings",
        "2",
        *FEW_PAIRS,
    )
    metrics = {f["metric"]: f["value"] for f in results["figures"]}
    assert metrics["FID of a half: other"] > metrics["FID of a half: real"]
    assert "FID of a half: reconstructed" not in metrics
    assert results["figures"][0]["group"] == "CTChest"


def test_a_small_other_set_makes_all_parts_small(tmp_path):
    write_set(tmp_path / "other", range(50, 52))
    real = write_set(tmp_path / "real", range(8))
    _, results = run(tmp_path, real, "--other", tmp_path / "other", "--networks", "random_3d", *FEW_PAIRS)
    num = {f["metric"]: f["num"] for f in results["figures"] if f["metric"].startswith("FID of a half")}
    assert num == dict.fromkeys(("FID of a half: other", "FID of a half: real"), {"of each": 2})


def test_one_class_alone_is_compared_with_no_other(tmp_path):
    _, results = run(tmp_path, write_set(tmp_path / "real", range(6)), "--networks", "random_3d", *FEW_PAIRS)
    assert not [f for f in results["figures"] if "other" in f["metric"]]
    assert [row[2] for row in results["tables"][0]["rows"]][:2] == ["more noise is farther", "more blur is farther"]


def test_noise_and_blur_are_those_that_their_name_says(tmp_path):
    write_set(tmp_path, [0, 1], size=24)
    volume, other = (SetVolume(tmp_path / f"v00{i}.nii.gz") for i in (0, 1))
    data = volume.read()
    noisy = Degraded(volume, "noise", 0.1)
    inside = (data > -0.5) & (data < 0.5)
    difference = (noisy.read() - data)[inside]
    assert difference.std() == pytest.approx(0.1, rel=0.05)
    assert difference.mean().abs() < 0.01
    assert noisy.read().min() == -1
    assert torch.equal(noisy.read(), noisy.read())
    assert not torch.equal(Degraded(other, "noise", 0.1).read() - other.read(), noisy.read() - data)
    blurred = Degraded(volume, "blur", 1.0).read()
    assert blurred.mean() == pytest.approx(data.mean().item(), abs=0.01)
    assert blurred.diff(dim=1).abs().mean() < 0.7 * data.diff(dim=1).abs().mean()
    keys = {Degraded(v, kind, level).key() for v in (volume, other) for kind in ("noise", "blur") for level in (1, 2)}
    assert len(keys | {volume.key()}) == 9


def test_reconstructions_go_through_the_network(tmp_path):
    autoencoder = load_autoencoder(save_models(tmp_path) / "ae.ckpt")
    network = VolumeFeatures("random_3d", "", RandomFeatures(3), {"a": 1})
    write_set(tmp_path / "real", [0, 1], size=32)
    volumes = torch.stack([read_volume(path).data for path in sorted((tmp_path / "real").glob("*"))])
    of_reconstructions = ReconstructedFeatures(network, autoencoder, "abc")
    with torch.inference_mode():
        expected = network(autoencoder.reconstruct(volumes).clamp(-1, 1))["volume"]
        torch.testing.assert_close(of_reconstructions(volumes)["volume"], expected, atol=1e-5, rtol=1e-4)
    assert of_reconstructions.settings == {**network.settings, "autoencoder_sha256": "abc"}


@pytest.mark.parametrize(
    ("count", "more", "message"),
    [
        (5, [], "real: 5 real volumes, at least 6 are needed"),
        (6, ["--other", "/nowhere"], "other: /nowhere: no such"),
        (6, ["--AE-ckpt", "/nowhere.ckpt"], "/nowhere.ckpt: no such checkpoint"),
    ],
)
def test_bad_input(tmp_path, count, more, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, write_set(tmp_path / "real", range(count)), *more)


@pytest.mark.parametrize("content", [b"nothing", None])
def test_damaged_volumes_are_named_or_left_out(tmp_path, content):
    """Without a header, and with one but cut off."""
    real = write_set(tmp_path / "real", range(7))
    path = real / "v003.nii.gz"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    message = "the file is truncated" if content is None else "not a NIfTI image"
    with pytest.raises(UserError, match=f"v003.nii.gz: {message}.*--exclude-unreadable"):
        run(tmp_path, real)
    _, results = run(tmp_path, real, "--exclude-unreadable", "--networks", "random_3d")
    assert [excluded["file"][-11:] for excluded in results["excluded"]] == ["v003.nii.gz"[-11:]]
    assert {f["num"]["real"] for f in results["figures"] if "real" in f["num"]} == {6}


def test_parts_are_of_subjects(tmp_path):
    """Eighteen scans of six, of which each part of the check of memorisation has two."""
    real = write_set(tmp_path / "real", range(18))
    for i, path in enumerate(sorted(real.glob("*.nii.gz"))):
        path.rename(real / f"{i % 6}-{i}.nii.gz")
    pattern = "--subject-pattern", "^(.+)-", "--networks", "random_3d", *FEW_PAIRS
    _, results = run(tmp_path, real, *pattern)
    num = {f["metric"]: f["num"] for f in results["figures"]}
    assert num["FID of a half: real"] == {"of each": 3}
    assert num["FID to itself: noise 0.1"] == {"real": 18, "real subjects": 6}
    (honest,) = [row for row in results["tables"][0]["rows"] if row[2].startswith("new real volumes are not")]
    assert honest[-1] == "holds"
    for path in real.glob("0-*"):
        path.unlink()
    with pytest.raises(UserError, match="real: 15 real volumes of 5 subjects, at least 6 subjects are needed"):
        run(tmp_path, real, *pattern)


def test_too_few_volumes_that_can_be_read(tmp_path):
    real = write_set(tmp_path / "real", range(6))
    path = real / "v003.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="real: 5 real volumes, at least 6 are needed"):
        run(tmp_path, real, "--exclude-unreadable")


def test_classes_of_a_json_are_compared_with_the_next(tmp_path):
    folders = {name: write_set(tmp_path / name, range(i, i + 6)) for i, name in ((0, "a"), (10, "b"), (20, "c"))}
    groups, others, *_ = validity.find_groups(
        validity_config(tmp_path, real=write_json(tmp_path / "d.json", **folders))
    )
    assert [group.name for group in groups] == ["a", "b", "c"]
    assert {name: volumes[0].path.parent.name for name, volumes in others.items()} == {"a": "b", "b": "c", "c": "a"}
