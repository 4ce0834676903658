"""Feature networks: fixed random ones, and pretrained ones read from files that the tests write."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from AutoEncoder.model.MedicalNetPerceptual import HUB_FOLDER
from common.errors import UserError
from config.schema.evaluation import FEATURE_NETWORKS
from evaluation.comparison.networks import (
    RANDOM,
    WEIGHT_FILES,
    RandomFeatures,
    SliceFeatures,
    VolumeFeatures,
    build_networks,
    load_resnet50,
    slice_places,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch, tmp_path):
    """Nothing of this machine's torch hub cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return resnet50(weights=None).state_dict()


@pytest.fixture(scope="module")
def volumes() -> torch.Tensor:
    return torch.rand(2, 1, 12, 16, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_options_name_every_network():
    assert set(FEATURE_NETWORKS) == {*WEIGHT_FILES, *RANDOM}


# Random -------------------------------------------------------------------------------------------------------------


def test_random_networks_are_the_same_everywhere():
    """A digest of the weights: whoever changes them has to raise RANDOM_VERSION."""
    digests = []
    for dimensions in (3, 2):
        weights = [
            np.round(value.detach().numpy().astype(np.float64), 4) for value in RandomFeatures(dimensions).parameters()
        ]
        text = " ".join(f"{number + 0.0:.4f}" for weight in weights for number in weight.ravel()[:50])
        digests.append(hashlib.sha256(text.encode()).hexdigest()[:12])
    assert digests == ["a58b1cccc028", "d24dd111e68b"]


def test_first_filters_of_random_networks_sum_to_zero():
    for dimensions in (3, 2):
        weight = RandomFeatures(dimensions).layers[0].weight
        assert weight.flatten(1).sum(1).abs().max() < 1e-5
        assert weight.flatten(1).std() > 0.1


def test_random_networks_do_not_touch_the_global_random_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.random.fork_rng():
        RandomFeatures(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.rand(1), expected)


def test_random_features_by_plane(volumes):
    of_volumes, of_slices = build_networks(["auto"], None, 4, CPU)
    assert of_volumes(volumes)["volume"].shape == (2, 1, 481)
    assert {plane: tuple(found.shape) for plane, found in of_slices(volumes).items()} == dict.fromkeys(
        ("axial", "coronal", "sagittal"), (2, 4, 481)
    )
    assert of_volumes.is_random
    assert of_slices.is_random
    torch.testing.assert_close(of_volumes(volumes)["volume"][:, 0, 0], volumes.flatten(1).mean(1))


def test_features_of_a_batch_are_those_of_its_volumes(volumes):
    for network in build_networks(["random_3d", "random_2d"], None, 3, CPU):
        for plane, together in network(volumes).items():
            alone = torch.cat([network(volume[None])[plane] for volume in volumes])
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# Slices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extent", "count", "expected"), [(8, 4, [1, 3, 5, 7]), (9, 3, [1, 4, 7]), (3, 5, [0, 1, 2]), (5, 1, [2])]
)
def test_slices_are_evenly_spaced(extent, count, expected):
    assert slice_places(extent, count).tolist() == expected


class Ends(nn.Module):
    """(N, 3, h, w) -> (N, 5): size, first and last pixel, and largest difference of the channels."""

    def forward(self, images):
        sizes = images.new_tensor([*images.shape[2:]]).expand(len(images), -1)
        spread = (images.amax(1) - images.amin(1)).flatten(1).amax(1)
        return torch.cat([sizes, images[:, 0, [0, -1], [0, -1]], spread[:, None]], dim=1)


def test_slices_lie_across_the_axis_of_their_plane(volumes):
    found = SliceFeatures("x", "", Ends(), {}, num_slices=2)(volumes)
    places = {"axial": (3, 9), "coronal": (5, 15), "sagittal": (4, 12)}
    for plane, (first, second) in places.items():
        axis = {"axial": 0, "sagittal": 1, "coronal": 2}[plane]  # z, x, y
        slices = torch.stack([volumes[:, 0].select(axis + 1, i) for i in (first, second)], dim=1)
        assert found[plane][0, 0, :2].tolist() == [*slices.shape[2:]]
        torch.testing.assert_close(found[plane][..., 2], slices[..., 0, 0])
        torch.testing.assert_close(found[plane][..., 3], slices[..., -1, -1])


def test_images_are_scaled_as_those_that_the_network_was_trained_on(volumes):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    class Channels(nn.Module):
        def forward(self, images):
            return images[:, :, 0, 0]

    found = SliceFeatures("x", "", Channels(), {}, num_slices=1, mean=mean, std=std)(volumes)["axial"]  # (2, 1, 3)
    pixel = (volumes[:, 0, 6, 0, 0] + 1) / 2
    expected = torch.stack([(pixel - m) / s for m, s in zip(mean, std, strict=True)], dim=1)
    torch.testing.assert_close(found[:, 0], expected)
    unscaled = SliceFeatures("x", "", Channels(), {}, num_slices=1)(volumes)["axial"]
    torch.testing.assert_close(unscaled[:, 0], volumes[:, 0, 6, 0, :1].expand(-1, 3))


def test_maps_of_volumes_are_averaged(volumes):
    network = VolumeFeatures("x", "", nn.Conv3d(1, 3, 1), {})
    expected = network.net(volumes).mean(dim=(2, 3, 4))
    torch.testing.assert_close(network(volumes)["volume"][:, 0], expected)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


# Weight files -------------------------------------------------------------------------------------------------------


def radimagenet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the authors' files: the children by number in "backbone", without the classifier."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {
        f"backbone.{numbers[first]}.{rest}": value
        for first, rest, value in ((*name.split(".", 1), value) for name, value in state.items())
        if first != "fc"
    }


def test_resnet50_of_both_kinds_of_file(tmp_path, state):
    net = resnet50(weights=None)
    net.load_state_dict(state)
    net.fc = nn.Identity()
    images = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = net.eval()(images)
        for name, content in (("a.pth", state), ("b.pt", radimagenet(state))):
            torch.save(content, tmp_path / name)
            torch.testing.assert_close(load_resnet50(tmp_path / name).eval()(images), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a file of weights", "not a readable checkpoint"),
        ([1, 2], "no dictionary of weights"),
        ({"conv1.weight": torch.zeros(2)}, "not the weights of a ResNet-50: conv1.weight"),
        ("other", "not the weights of a ResNet-50: layer9.0.weight"),
    ],
)
def test_other_weight_files_are_refused(tmp_path, state, content, message):
    path = tmp_path / "resnet50-11ad3fa6.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({**state, "layer9.0.weight": torch.zeros(1)} if content == "other" else content, path)
    with pytest.raises(UserError, match=f"{path.name}: {message}"):
        build_networks(["imagenet_resnet50"], tmp_path, 2, CPU)


def test_auto_takes_every_file_that_is_there_and_random_ones_for_the_rest(tmp_path, state, volumes):
    assert [net.name for net in build_networks(["auto"], None, 2, CPU)] == ["random_3d", "random_2d"]
    torch.save(radimagenet(state), tmp_path / "ResNet50.pt")
    torch.save(state, tmp_path / "resnet50-0676ba61.pth")
    networks = build_networks(["auto"], tmp_path, 2, CPU)
    assert [net.name for net in networks] == ["imagenet_resnet50", "radimagenet_resnet50", "random_3d"]
    with torch.inference_mode():
        assert networks[0](volumes)["coronal"].shape == (2, 2, 2048)
    assert networks[0].mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert networks[0].std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert networks[1].mean.flatten().tolist() == networks[1].std.flatten().tolist() == [0.5] * 3
    digest = hashlib.sha256((tmp_path / "ResNet50.pt").read_bytes()).hexdigest()
    assert networks[1].settings["weights_sha256"] == digest


def test_files_in_torch_hubs_cache_are_found(tmp_path, state):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth")
    assert build_networks(["auto"], None, 2, CPU)[0].name == "imagenet_resnet50"


def test_medicalnet_is_read_from_its_file(tmp_path, volumes):
    net = torch.hub.load(str(HUB_FOLDER), "medicalnet_resnet50", source="local", pretrained=False)
    content = {"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}
    torch.save(content, tmp_path / "resnet_50.pth")
    network, slices = build_networks(["auto"], tmp_path, 2, CPU)
    assert (network.name, slices.name) == ("medicalnet_resnet50", "random_2d")
    with torch.inference_mode():
        expected = net(volumes).mean(dim=(2, 3, 4))
        torch.testing.assert_close(network(volumes)["volume"][:, 0], expected)


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_network_asked_for_by_name_without_its_file_says_what_and_where(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} needs {WEIGHT_FILES[name][0]}.*none of {tmp_path}.*--weights-dir"):
        build_networks([name], tmp_path, 2, CPU)


def test_a_folder_of_weights_that_is_none(tmp_path):
    with pytest.raises(UserError, match="weights_dir: .*nowhere: no such folder"):
        build_networks(["auto"], tmp_path / "nowhere", 2, CPU)


def test_a_damaged_file_of_medicalnet_is_one_line(tmp_path):
    (tmp_path / "resnet_50.pth").write_bytes(b"PK cut off")
    with pytest.raises(UserError, match=r"resnet_50.pth is no readable file"):
        build_networks(["auto"], tmp_path, 2, CPU)
