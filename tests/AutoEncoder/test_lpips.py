"""LPIPS on slices and volumes: parity with the official numbers, weight files, frozenness, the draw of slices."""

import importlib.util
import logging
import shutil
import socket
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from golden import GOLDEN_SEED, fill_module, golden_normal, load_golden

from AutoEncoder.model import lpips_weights
from AutoEncoder.model.lpips import LPIPS, TriplanarLPIPS, normalise_channels
from AutoEncoder.model.PatchVolume import build_perceptual

VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbers of VGG-16's convolutions


def golden_lpips(net: LPIPS) -> LPIPS:
    fill_module(net)
    for i in range(5):
        getattr(net, f"lin{i}").model[1].weight.abs_()
    return net


@pytest.fixture(scope="module")
def triplanar() -> TriplanarLPIPS:
    net = TriplanarLPIPS(pretrained=False, fraction=1.0)
    golden_lpips(net.lpips)
    return net


@pytest.fixture(scope="module")
def volumes() -> tuple[torch.Tensor, torch.Tensor]:
    a = golden_normal(GOLDEN_SEED, "a", (1, 1, 32, 32, 32)).clamp(-1, 1)
    return a, (a + 0.3 * golden_normal(GOLDEN_SEED, "b", a.shape)).clamp(-1, 1)


@pytest.fixture(scope="module")
def official_files(triplanar, tmp_path_factory) -> Path:
    """A folder with both weight files in the published formats, holding the golden weights."""
    folder = tmp_path_factory.mktemp("weights")
    backbone = {f"features.{name.split('.', 1)[1]}": value for name, value in triplanar.lpips.net.state_dict().items()}
    torch.save({**backbone, "classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16-397923af.pth")
    heads = {name: value for name, value in triplanar.lpips.state_dict().items() if name.startswith("lin")}
    torch.save(heads, folder / "vgg.pth")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path) -> list[float | None]:
    """An empty torch hub cache, and no network; returns the socket time-outs under which fetching was tried."""
    timeouts = []

    def refuse(*_args, **_kwargs):
        timeouts.append(socket.getdefaulttimeout())
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    return timeouts


def test_slices_match_golden(triplanar, volumes):
    a, b = volumes
    distance = triplanar.lpips(a[:, :, 0], b[:, :, 0])
    assert distance.shape == (1, 1, 1, 1)
    torch.testing.assert_close(distance.flatten().numpy(), load_golden("perceptual")["lpips_slices"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunk_pixels", [2**21, 7 * 32 * 32, 1])
def test_all_slices_match_golden_in_any_chunks(triplanar, volumes, monkeypatch, chunk_pixels):
    monkeypatch.setattr(triplanar, "chunk_pixels", chunk_pixels)
    expected = float(load_golden("perceptual")["lpips_triplanar_all_slices"])
    with torch.no_grad():
        loss = triplanar(*volumes)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_names_are_those_of_lpips_v01(triplanar):
    slice_of = {n: 1 + sum(n >= start for start in (5, 10, 17, 24)) for n in VGG_CONVS}
    names = {f"net.slice{slice_of[n]}.{n}.{kind}" for n in VGG_CONVS for kind in ("weight", "bias")}
    assert set(triplanar.lpips.state_dict()) == names | {f"lin{i}.model.1.weight" for i in range(5)}


def test_one_channel_is_repeated_to_three(triplanar, volumes):
    x, y = volumes[0][:, :, 0], volumes[1][:, :, 0]
    three = triplanar.lpips(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1))
    torch.testing.assert_close(triplanar.lpips(x, y), three)


def test_distance_is_per_slice_and_zero_for_equal_slices(triplanar, volumes):
    x = torch.cat([volumes[0][:, :, 0], volumes[0][:, :, 0]])
    y = torch.cat([volumes[1][:, :, 0], volumes[0][:, :, 0]])
    distance = triplanar.lpips(x, y).flatten()
    assert distance[0] > 1e-3
    assert distance[1] == 0


def test_frozen_and_in_eval_whatever_a_parent_does(triplanar):
    torch.nn.Sequential(triplanar).train()
    assert not any(module.training for module in triplanar.modules())
    assert not LPIPS(pretrained=False).train().training
    assert not any(parameter.requires_grad for parameter in triplanar.parameters())


@pytest.mark.parametrize("chunk_pixels", [2**21, 3 * 32 * 32])
def test_gradient_flows_to_the_input_only(triplanar, volumes, monkeypatch, chunk_pixels):
    """Also when chunks are recomputed: the gradient is that of one chunk."""
    gradients = []
    for pixels in (2**21, chunk_pixels):
        monkeypatch.setattr(triplanar, "chunk_pixels", pixels)
        monkeypatch.setattr(triplanar, "fraction", 0.2)
        x = volumes[0].clone().requires_grad_()
        triplanar(x, volumes[1], generator=torch.Generator().manual_seed(3)).backward()
        gradients.append(x.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
    assert all(parameter.grad is None for parameter in triplanar.parameters())


def test_gradient_is_finite_where_all_features_are_zero():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (normalise_channels(features, 1e-10) - 1).square().sum().backward()
    assert torch.isfinite(features.grad).all()


class SlicesSeen(torch.nn.Module):
    """Stands in for LPIPS; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, x, y):
        self.calls.append((x, y))
        return x.new_zeros(len(x), 1, 1, 1)


def drawn_slices(size: tuple[int, int, int], fraction: float, seed: int) -> list[list[int]]:
    """Which slices of each axis were compared; every voxel of the test volume holds its own (z, x, y)."""
    net = TriplanarLPIPS(pretrained=False, fraction=fraction)
    net.lpips = SlicesSeen()
    grid = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij")).float()[None].repeat(2, 1, 1, 1, 1)
    net(grid, grid + 1000, generator=torch.Generator().manual_seed(seed))
    drawn = []
    for axis, (x, y) in enumerate(net.lpips.calls):
        assert torch.equal(x + 1000, y)  # the same slices of both volumes
        others = [extent for i, extent in enumerate(size) if i != axis]
        assert list(x.shape[2:]) == others
        assert all(len(plane.unique()) == 1 for plane in x[:, axis])
        drawn.append([int(plane[0, 0]) for plane in x[:, axis]])
    return drawn


@pytest.mark.parametrize(
    ("size", "fraction", "counts"),
    [((30, 20, 40), 0.2, [6, 4, 8]), ((16, 17, 18), 0.01, [1, 1, 1]), ((16, 17, 18), 1.0, [16, 17, 18])],
)
def test_share_of_slices_drawn(size, fraction, counts):
    for slices, count in zip(drawn_slices(size, fraction, seed=0), counts, strict=True):
        assert len(slices) == 2 * count  # two volumes in the batch
        assert slices[:count] == slices[count:] == sorted(set(slices))


def test_chunks_hold_no_more_pixels_than_asked():
    net = TriplanarLPIPS(pretrained=False, fraction=1.0, chunk_pixels=5 * 20 * 30)
    net.lpips = SlicesSeen()
    net(torch.zeros(1, 1, 7, 20, 30), torch.zeros(1, 1, 7, 20, 30))
    # 7 slices of 20 x 30 pixels, 20 of 7 x 30, 30 of 7 x 20: at most 3000 pixels at once
    assert [len(x) for x, _ in net.lpips.calls] == [5, 2, 14, 6, 21, 9]


def test_slices_are_random_and_follow_the_generator():
    assert drawn_slices((20, 20, 20), 0.2, seed=0) == drawn_slices((20, 20, 20), 0.2, seed=0)
    assert drawn_slices((20, 20, 20), 0.2, seed=0) != drawn_slices((20, 20, 20), 0.2, seed=1)


def test_official_files_load(official_files, volumes, offline):
    net = LPIPS(official_files)
    expected = load_golden("perceptual")["lpips_slices"]
    distance = net(volumes[0][:, :, 0], volumes[1][:, :, 0]).flatten().numpy()
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=0)
    assert isinstance(build_perceptual(False, str(official_files)), TriplanarLPIPS)


def test_backbone_from_the_hub_cache_and_heads_from_the_package(official_files, offline, tmp_path, caplog):
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("the package lpips is not installed")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(official_files / "vgg16-397923af.pth", tmp_path / "hub" / "checkpoints")
    with caplog.at_level(logging.WARNING):
        net = LPIPS()
    assert "not torchvision's file" in caplog.text  # the golden weights have another hash
    assert all((getattr(net, f"lin{i}").model[1].weight >= 0).all() for i in range(5))  # as published
    assert offline == []


def test_offline_without_backbone_names_file_and_place(official_files, offline, tmp_path):
    shutil.copy(official_files / "vgg.pth", tmp_path)
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth were not found") as error:
        LPIPS(tmp_path)
    message = str(error.value)
    assert f"put it in {tmp_path}" in message
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in message
    assert "no route to host" in message
    assert "\n" not in message
    assert offline == [lpips_weights.TIMEOUT_S]  # so that a network that answers nothing can't hang
    assert socket.getdefaulttimeout() is None


def test_missing_heads_name_file_and_place(official_files, offline, monkeypatch, tmp_path):
    monkeypatch.setattr(lpips_weights, "package_folder", list)
    shutil.copy(official_files / "vgg16-397923af.pth", tmp_path)
    with pytest.raises(ValueError, match=r"heads .*\(vgg\.pth\) were not found in .*pip install lpips.* put it in"):
        LPIPS(tmp_path)
    with pytest.raises(ValueError, match=r"model\.perceptual_weights"):
        LPIPS()


def test_bad_files_and_folders_are_refused(official_files, offline, tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        LPIPS(tmp_path / "absent")
    heads = tmp_path / "vgg.pth"
    for size in (200, 0):
        heads.write_bytes((official_files / "vgg.pth").read_bytes()[:size])
        with pytest.raises(ValueError, match=r"vgg\.pth: .*(truncated|readable|damaged)"):
            LPIPS(tmp_path)
    torch.save({"lin0.model.1.weight": torch.zeros(1, 63, 1, 1)}, heads)
    with pytest.raises(
        ValueError, match=r"lin0\.model\.1\.weight has shape \(1, 63, 1, 1\), needed is \(1, 64, 1, 1\)"
    ):
        LPIPS(tmp_path)
    torch.save({"model.weight": torch.zeros(1)}, heads)
    with pytest.raises(ValueError, match=r"has no lin0\.model\.1\.weight"):
        LPIPS(tmp_path)
    torch.save({"hook": print}, heads)
    with pytest.raises(ValueError, match="refused: it asks for"):
        LPIPS(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 1, 16, 16), (1, 1, 16, 17)), "one shape"),
        (((1, 2, 16, 16), (1, 2, 16, 16)), "1 or 3"),
        (((1, 1, 16, 15), (1, 1, 16, 15)), "at least 16 x 16 pixels, got 16 x 15"),
    ],
)
def test_wrong_slices(triplanar, shapes, message):
    with pytest.raises(ValueError, match=message):
        triplanar.lpips(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_wrong_volumes_and_fraction(triplanar):
    with pytest.raises(ValueError, match="two volumes"):
        triplanar(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="fraction"):
        TriplanarLPIPS(pretrained=False, fraction=0.0)
