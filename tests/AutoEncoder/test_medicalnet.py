"""MedicalNet: the hub folder, its weight files, parity with the official numbers, and the 3D perceptual loss."""

import hashlib
import importlib
import logging
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from golden import GOLDEN_SEED, fill_module, golden_normal, load_golden, load_keys

from AutoEncoder.model.MedicalNetPerceptual import HUB_FOLDER, MedicalNetPerceptual, z_score
from AutoEncoder.model.PatchVolume import build_perceptual

FILE = "resnet_10_23dataset.pth"


def load_hub(entry_point: str, **kwargs) -> torch.nn.Module:
    return torch.hub.load(str(HUB_FOLDER), entry_point, source="local", **kwargs)


@pytest.fixture(scope="module")
def volumes() -> tuple[torch.Tensor, torch.Tensor]:
    a = golden_normal(GOLDEN_SEED, "a", (1, 1, 32, 32, 32)).clamp(-1, 1)
    return a, (a + 0.3 * golden_normal(GOLDEN_SEED, "b", a.shape)).clamp(-1, 1)


@pytest.fixture(scope="module")
def perceptual() -> MedicalNetPerceptual:
    net = MedicalNetPerceptual(pretrained=False)
    fill_module(net.net)
    return net


def write_official(net: torch.nn.Module, path: Path, **more) -> None:
    """As the authors saved theirs: inside DataParallel, with other entries beside the weights."""
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": {**state, "module.conv_seg.0.weight": torch.zeros(2), **more}}, path)


@pytest.fixture(scope="module")
def official_folder(perceptual, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_official(perceptual.net, folder / FILE)
    return folder


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """The module that finds weight files, with empty default folders and no network; `attempts` lists fetched URLs."""
    load_hub("medicalnet_resnet10", pretrained=False)  # makes the hub's package importable
    module = importlib.import_module("medicalnet_models.weights")
    module.attempts = []

    def refuse(url, dst, **_kwargs):
        module.attempts.append((url, socket.getdefaulttimeout()))
        raise URLError("no route to host")

    (tmp_path / "default").mkdir()
    monkeypatch.setattr(module, "DEFAULT_FOLDER", tmp_path / "default")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return module


def test_names_and_shapes_match_the_manifest(perceptual):
    assert {name: tuple(value.shape) for name, value in perceptual.net.state_dict().items()} == load_keys(
        "medicalnet10"
    )


def test_resnet10_features_match_golden(perceptual, volumes):
    golden = load_golden("perceptual")
    with torch.no_grad():
        features = perceptual.net(volumes[0])
    assert tuple(features.shape) == tuple(golden["medicalnet10_shape"])
    assert float(features.mean()) == pytest.approx(float(golden["medicalnet10_features_mean"]), rel=1e-4)
    std = float(golden["medicalnet10_features_std"])
    assert float(features.std()) == pytest.approx(std, rel=1e-4)
    expected = torch.from_numpy(golden["medicalnet10_features"])
    torch.testing.assert_close(features[:, ::32], expected, rtol=1e-4, atol=1e-4 * std)


def test_loss_matches_golden(perceptual, volumes):
    with torch.no_grad():
        loss = perceptual(*volumes)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(load_golden("perceptual")["medicalnet10_loss"]), rel=1e-4)


def test_resnet50_features_match_golden(volumes):
    golden = load_golden("perceptual")
    net = fill_module(load_hub("medicalnet_resnet50", pretrained=False))
    with torch.no_grad():
        features = net(volumes[0])
    assert tuple(features.shape) == tuple(golden["medicalnet50_shape"])
    expected = torch.from_numpy(golden["medicalnet50_features_mean_per_channel"])
    atol = 1e-4 * float(features.std())
    torch.testing.assert_close(features.mean(dim=(2, 3, 4))[:, ::16], expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(
    ("entry_point", "blocks"),
    [
        ("medicalnet_resnet10", (1, 1, 1, 1)),
        ("medicalnet_resnet10_23datasets", (1, 1, 1, 1)),
        ("medicalnet_resnet50", (3, 4, 6, 3)),
        ("medicalnet_resnet50_23datasets", (3, 4, 6, 3)),
        ("medicalnet_resnet101", (3, 4, 23, 3)),
        ("medicalnet_resnet152", (3, 8, 36, 3)),
        ("medicalnet_resnet200", (3, 24, 36, 3)),
    ],
)
def test_every_entry_point(entry_point, blocks):
    with torch.device("meta"):
        net = load_hub(entry_point, pretrained=False)
    assert tuple(len(getattr(net, f"layer{i}")) for i in range(1, 5)) == blocks
    assert not net.training


def test_hub_loads_from_anywhere_twice_beside_packages_of_common_names(tmp_path):
    """A working directory with its own `models`, `resnet` and `weights` modules must not be taken for the hub's."""
    for name in ("models", "resnet", "weights", "medicalnet"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong module')")
    load = f"torch.hub.load({str(HUB_FOLDER)!r}, 'medicalnet_resnet10', source='local', pretrained=False)"
    code = f"import sys, torch; sys.path.insert(0, ''); {load}; print(type({load}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "MedicalNetResNet\n", done.stderr


def test_official_file_loads(official_folder, volumes, weights):
    net = MedicalNetPerceptual(official_folder)
    with torch.no_grad():
        loss = float(net(*volumes))
    assert loss == pytest.approx(float(load_golden("perceptual")["medicalnet10_loss"]), rel=1e-4)
    assert isinstance(build_perceptual(True, str(official_folder)), MedicalNetPerceptual)
    assert weights.attempts == []


def test_default_folder_and_files_without_batch_counters(perceptual, weights, tmp_path):
    """Files from before PyTorch 0.4.1 lack `num_batches_tracked`."""
    state = {k: v for k, v in perceptual.net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "default" / "resnet_10.pth")
    net = load_hub("medicalnet_resnet10")
    assert torch.equal(net.layer4[0].conv2.weight, perceptual.net.layer4[0].conv2.weight)


def test_offline_names_file_place_and_address(weights, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"resnet_10_23dataset\.pth were not found") as error:
        build_perceptual(True, str(tmp_path / "mine"))
    message = str(error.value)
    url = "https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet10/resolve/main/resnet_10_23dataset.pth"
    assert url in message
    assert message.endswith(f"put it in {tmp_path / 'mine'}")
    assert str(tmp_path / "default") in message
    assert "no route to host" in message
    assert "\n" not in message
    assert weights.attempts == [(url, weights.TIMEOUT_S)]  # so that a network that answers nothing can't hang
    assert socket.getdefaulttimeout() is None
    assert list((tmp_path / "mine").iterdir()) == []


def test_download_is_renamed_only_when_whole(official_folder, weights, monkeypatch, tmp_path):
    whole = (official_folder / FILE).read_bytes()
    content = whole[: len(whole) // 2]

    def fetch(_url, dst, **_kwargs):
        Path(dst).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(ValueError, match="could not be fetched"):
        load_hub("medicalnet_resnet10_23datasets")
    assert list((tmp_path / "default").iterdir()) == []
    content = whole
    sums = tmp_path / "default" / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  {FILE}\n")
    with pytest.raises(ValueError, match=f"SHA256SUMS lists {'0' * 64}"):
        load_hub("medicalnet_resnet10_23datasets")
    assert list((tmp_path / "default").iterdir()) == [sums]
    sums.unlink()
    load_hub("medicalnet_resnet10_23datasets")
    assert [path.name for path in (tmp_path / "default").iterdir()] == [FILE]
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    load_hub("medicalnet_resnet10_23datasets")  # from the folder now


def test_listed_hashes_are_binding(official_folder, weights, tmp_path, caplog):
    shutil.copy(official_folder / FILE, tmp_path)
    with caplog.at_level(logging.INFO):
        load_hub("medicalnet_resnet10_23datasets", weights_dir=tmp_path)
        load_hub("medicalnet_resnet10_23datasets", weights_dir=tmp_path)
    digest = hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()
    assert caplog.text.count(digest) <= 1  # once in a process, and another test may have been first
    (tmp_path / "SHA256SUMS").write_text(f"# pinned\n\n{digest}  {FILE}\n{'0' * 64} *resnet_50.pth\n")
    load_hub("medicalnet_resnet10_23datasets", weights_dir=tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64} *{FILE}\n")  # the star of binary mode
    with pytest.raises(ValueError, match=f"SHA-256 {digest}, but SHA256SUMS lists {'0' * 64}"):
        load_hub("medicalnet_resnet10_23datasets", weights_dir=tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"abc123  {FILE}\n")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        load_hub("medicalnet_resnet10_23datasets", weights_dir=tmp_path)


def test_hash_of_an_unlisted_file_is_logged_once(official_folder, weights, caplog, monkeypatch):
    monkeypatch.setattr(weights, "_logged", set())
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            load_hub("medicalnet_resnet10_23datasets", weights_dir=official_folder)
    assert caplog.text.count(hashlib.sha256((official_folder / FILE).read_bytes()).hexdigest()) == 1


def test_bad_files_are_refused(perceptual, weights, tmp_path):
    def load():
        load_hub("medicalnet_resnet10_23datasets", weights_dir=tmp_path)

    path = tmp_path / FILE
    with pytest.raises(ValueError, match="does not exist"):
        load_hub("medicalnet_resnet10", weights_dir=tmp_path / "absent")
    torch.save({"state_dict": {}, "hook": print}, path)
    with pytest.raises(ValueError, match="Unsupported"):
        load()
    for content in (b"<html>quota exceeded</html>", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{FILE} is no readable file"):
            load()
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state_dict"):
        load()
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(64, 1, 7, 7, 7)}}, path)
    with pytest.raises(ValueError, match=r"lacks bn1\.weight and \d+ more: it is not MedicalNet's ResNet-10"):
        load()
    write_official(perceptual.net, path, **{"module.layer1.1.conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown layer1\.1\.conv1\.weight"):
        load()
    write_official(perceptual.net, path, **{"module.bn1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"another shape for bn1\.weight"):
        load()


def test_frozen_and_in_eval_whatever_a_parent_does(perceptual):
    torch.nn.Sequential(perceptual).train()
    assert not any(module.training for module in perceptual.modules())
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_gradient_flows_to_the_input_only(perceptual, volumes):
    x = volumes[0].clone().requires_grad_()
    before = {name: value.clone() for name, value in perceptual.state_dict().items()}
    perceptual(x, volumes[1]).backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in perceptual.parameters())
    assert all(torch.equal(value, before[name]) for name, value in perceptual.state_dict().items())


def test_z_score_is_over_the_whole_tensor_and_survives_a_constant_one():
    x = torch.stack([torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)])
    expected = (x - 0.5) / (0.25 * 16 / 15) ** 0.5  # not each volume by itself, which would be all zero
    torch.testing.assert_close(z_score(x), expected)
    constant = torch.zeros(1, 1, 4, 4, 4, requires_grad=True)
    score = z_score(constant)
    assert torch.equal(score, torch.zeros_like(score))
    score.sum().backward()
    assert torch.isfinite(constant.grad).all()


def test_wrong_shapes(perceptual):
    for shapes in (((1, 1, 8, 8, 8), (1, 1, 8, 8, 9)), ((1, 2, 8, 8, 8),) * 2, ((1, 1, 8, 8),) * 2):
        with pytest.raises(ValueError, match=r"two volumes \(B, 1, D, H, W\)"):
            perceptual(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
