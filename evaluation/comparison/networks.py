"""The networks whose features sets of volumes are compared on, read from files; without any, fixed random ones.

| name | input | features | weight file |
|---|---|---|---|
| medicalnet_resnet50 | volume | 2048 | `resnet_50.pth` (Med3D, Chen et al., arXiv 1904.00625; HA-GAN's protocol) |
| imagenet_resnet50 | slices of three planes | 2048 | `resnet50-11ad3fa6.pth` or `resnet50-0676ba61.pth` (torchvision) |
| radimagenet_resnet50 | slices of three planes | 2048 | `RadImageNet-ResNet50.pt` or `ResNet50.pt` (Mei et al. 2022) |
| random_3d, random_2d | volume, slices | 481 | none: weights of a fixed seed, for want of anything better |

Nothing is downloaded: a number must not depend on whether a server answered. docs/evaluation.md says where to get them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from AutoEncoder.model.MedicalNetPerceptual import HUB_FOLDER
from common.checkpoint_contents import check_archive, check_contents
from common.checkpoint_files import load_plain
from common.errors import UserError
from common.files import file_sha256
from common.places import home_expanded, is_file, is_folder, missing_folder
from common.processes import device_name
from dataset.volumes.pictures import PLANES

VOLUME = "volume"  # the one "plane" of a network that takes volumes
AXES = {"axial": 2, "coronal": 4, "sagittal": 3}  # axis of (B, 1, D, H, W) that slices of a plane lie across
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation that leave [-1, 1] as it is
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images in [0, 1]
RANDOM_WIDTHS = (32, 64, 128, 256)
RANDOM_SEED = 20260101
RANDOM_VERSION = 1  # rises when the random networks give other features
# RadImageNet's files hold the children of torchvision's ResNet by their number, inside "backbone".
CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
MOST_PIXELS = 2**23  # of slices that go through a network at once


class FeatureNetwork(nn.Module):
    """Frozen; volumes (B, 1, D, H, W) in [-1, 1] -> {plane: (B, S, F)}, S slices of each plane (S = 1 for volumes).

    name: as in results. description: what it is, for people. planes: the keys of what it returns. settings: what its
    features depend on.
    """

    name: str
    description: str
    planes: Sequence[str]
    settings: dict[str, Any]

    @property
    def is_random(self) -> bool:
        return self.name.startswith("random")

    @property
    def takes_volumes(self) -> bool:
        """Whether it sees whole volumes, not slices."""
        return tuple(self.planes) == (VOLUME,)


class VolumeFeatures(FeatureNetwork):
    """Features of whole volumes: the mean of a network's last maps over all voxels ("global average pool").

    As in HA-GAN (Sun et al., IEEE JBHI 2022) intensities in [-1, 1] go into the network as they are: an overall shift
    of intensities is a difference between two sets, which a z-score would hide.
    """

    planes = (VOLUME,)

    def __init__(self, name: str, description: str, net: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.description, self.net = name, description, net
        self.settings = {"network": name, "input": "[-1, 1]", "pool": "mean", **settings}
        self.requires_grad_(False).eval()

    def forward(self, volumes: Tensor) -> dict[str, Tensor]:
        features = self.net(volumes)  # (B, F, d, h, w) or (B, F)
        return {VOLUME: features.flatten(2).mean(2).unsqueeze(1) if features.ndim > 2 else features.unsqueeze(1)}


class SliceFeatures(FeatureNetwork):
    """Features of slices of the three planes ("2.5D", MAISI, Guo et al., arXiv 2409.11169), each plane by itself.

    net: (N, 3, h, w) -> (N, F). num_slices: of each plane, evenly spaced; all, where a volume has fewer. mean, std: of
    the images in [0, 1] that the network was trained on; (0.5, 0.5) are images in [-1, 1].
    """

    planes = PLANES

    def __init__(
        self, name: str, description: str, net: nn.Module, settings: dict, num_slices: int, mean=HALF, std=HALF
    ) -> None:
        super().__init__()
        self.name, self.description, self.net, self.num_slices = name, description, net, num_slices
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)
        self.settings = {"network": name, "slices": num_slices, "mean": list(mean), "std": list(std), **settings}
        self.requires_grad_(False).eval()

    def forward(self, volumes: Tensor) -> dict[str, Tensor]:
        return {plane: self._plane(volumes, AXES[plane]) for plane in self.planes}

    def _plane(self, volumes: Tensor, axis: int) -> Tensor:
        places = slice_places(volumes.shape[axis], self.num_slices).to(volumes.device)
        slices = volumes.index_select(axis, places).movedim(axis, 1)  # (B, S, 1, h, w)
        images = slices.flatten(0, 1).expand(-1, 3, -1, -1)  # (B·S, 3, h, w)
        per_chunk = max(1, MOST_PIXELS // images[0, 0].numel())
        features = [self.net(((chunk + 1) / 2 - self.mean) / self.std) for chunk in images.split(per_chunk)]
        return torch.cat(features).unflatten(0, (len(volumes), len(places)))  # (B, S, F)


def slice_places(extent: int, count: int) -> Tensor:
    """Indices of `count` evenly spaced slices of `extent`, in the middle of equal parts; all, if there are fewer."""
    count = min(count, extent)
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * extent / count).long()


class RandomFeatures(nn.Module):
    """The mean intensity and the means of the maps of four strided convolutions of fixed random weights, 481 features.

    Filters of the first layer sum to zero: they see edges and texture. With others the brightness of an image outweighs
    these, and slight blur brings sets nearer (measured with `evaluation/validity.py`).
    Distances on these features order sets by how much they differ, but can't be compared with anybody else's.

    dimensions: 3 for (B, 1, D, H, W), 2 for (N, 3, h, w).
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        rng = np.random.default_rng(RANDOM_SEED + dimensions)  # of numpy: the same in every version of torch
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        in_width = 1
        self.layers = nn.ModuleList()
        for width in RANDOM_WIDTHS:
            layer = convolution(in_width, width, 3, stride=2, padding=1)
            weight = rng.standard_normal(layer.weight.shape)
            if in_width == 1:
                weight -= weight.mean(axis=tuple(range(1, weight.ndim)), keepdims=True)
            weight *= (2 / weight[0].size) ** 0.5
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(0.1 * rng.standard_normal(width)))
            self.layers.append(layer)
            in_width = width

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :1]  # the three channels of a slice are the same
        means = [x.flatten(2).mean(2)]
        for layer in self.layers:
            x = torch.relu(layer(x))  # (B, F, d, h, w) or (B, F, h, w), half as large in each direction
            means.append(x.flatten(2).mean(2))
        return torch.cat(means, dim=1)  # (B, 481)


# ------------------------------------------------------------------------------------------------------------- loading


# Of the pretrained networks the names that their file may have, and the planes of their features.
WEIGHT_FILES = {
    "medicalnet_resnet50": ("resnet_50.pth",),
    "imagenet_resnet50": ("resnet50-11ad3fa6.pth", "resnet50-0676ba61.pth"),
    "radimagenet_resnet50": ("RadImageNet-ResNet50.pt", "ResNet50.pt"),
}
PLANES_OF = {"medicalnet_resnet50": (VOLUME,), "imagenet_resnet50": PLANES, "radimagenet_resnet50": PLANES}
RANDOM = {"random_3d": (VOLUME,), "random_2d": PLANES}


def build_networks(
    names: Sequence[str], weights_dir: str | Path | None, num_slices: int, device: torch.device
) -> list[FeatureNetwork]:
    """The networks by name; for "auto" all pretrained ones whose file is there, and random ones for what has none.

    Raises UserError: a file that is missing (it says where it was looked for), damaged or another network's.
    """
    if list(names) == ["auto"]:
        names = [name for name in WEIGHT_FILES if find_weights(name, weights_dir) is not None]
        planes = {plane for name in names for plane in PLANES_OF[name]}
        names += [name for name, of_random in RANDOM.items() if not planes.issuperset(of_random)]
    return [_build(name, weights_dir, num_slices).to(device) for name in dict.fromkeys(names)]


def describe_networks(networks: Sequence[FeatureNetwork], device: torch.device) -> dict[str, Any]:
    """What the settings of results say of them."""
    described = {net.name: {"is": net.description, **net.settings} for net in networks}
    return {"device": device_name(device), "feature_networks": described}


def find_weights(name: str, weights_dir: str | Path | None) -> Path | None:
    """The weight file of a pretrained network: in the folder, in torch hub's cache, or where MedicalNet's lie."""
    files = (folder / file for folder in _folders(weights_dir) for file in WEIGHT_FILES[name])
    return next((file for file in files if is_file(file)), None)


def weight_folders(weights_dir: str | Path | None) -> tuple[list[Path], Path]:
    """The user's folder, if one is named, and torch hub's cache. UserError: a folder that doesn't exist."""
    own = [] if weights_dir is None else [home_expanded(weights_dir)]
    if own and not is_folder(own[0]):
        raise UserError(f"weights_dir: {own[0]}: {missing_folder(own[0])}: give the one that holds the weight files")
    return own, Path(torch.hub.get_dir()) / "checkpoints"


def _folders(weights_dir: str | Path | None) -> list[Path]:
    own, hub_cache = weight_folders(weights_dir)
    return [*own, hub_cache, HUB_FOLDER / "medicalnet"]


def _build(name: str, weights_dir: str | Path | None, num_slices: int) -> FeatureNetwork:
    settings = {"seed": RANDOM_SEED, "version": RANDOM_VERSION}
    if name == "random_3d":
        return VolumeFeatures(name, "untrained 3D network with fixed random weights", RandomFeatures(3), settings)
    if name == "random_2d":
        net, description = RandomFeatures(2), "untrained 2D network with fixed random weights"
        return SliceFeatures(name, description, net, settings, num_slices)
    path = find_weights(name, weights_dir)
    if path is None:
        raise UserError(
            f"networks: {name} needs {' or '.join(WEIGHT_FILES[name])}, which is in none of "
            f"{', '.join(map(str, _folders(weights_dir)))}: put it there, or name its folder with --weights-dir "
            "(docs/evaluation.md says where it is had)"
        )
    settings = {"weights_sha256": file_sha256(path)}
    if name == "medicalnet_resnet50":
        check_archive(Path(path), path)
        try:
            net = torch.hub.load(str(HUB_FOLDER), name, source="local", weights_dir=path.parent)
        except ValueError as error:
            raise UserError(str(error)) from error
        return VolumeFeatures(name, "MedicalNet ResNet-50, global average pool", net, settings)
    net = load_resnet50(path)
    if name == "radimagenet_resnet50":
        return SliceFeatures(name, "ResNet-50 trained on RadImageNet", net, settings, num_slices)
    description = "ResNet-50 trained on ImageNet"
    return SliceFeatures(name, description, net, settings, num_slices, IMAGENET_MEAN, IMAGENET_STD)


def load_resnet50(path: Path) -> nn.Module:
    """torchvision's ResNet-50 without its classifier, (N, 3, h, w) -> (N, 2048), of torchvision or RadImageNet.

    Nothing in the file is executed. UserError: unreadable, or another network's.
    """
    state = load_plain(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: no dictionary of weights: it is not the file of a ResNet-50")
    check_contents(path, state)
    state = {_torchvision_name(name): value for name, value in state.items()}
    from torchvision.models import resnet50  # here, since importing it takes as long as all the rest

    net = resnet50(weights=None)
    net.fc = nn.Identity()
    expected = net.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    wrong = [name for name in wrong if not name.endswith("num_batches_tracked")]  # not in old files, not used in eval
    wrong += [name for name in state if name not in expected]
    if wrong:
        raise UserError(f"{path}: not the weights of a ResNet-50: {wrong[0]} is missing, unknown or has another shape")
    net.load_state_dict(state, strict=False)
    return net


def _torchvision_name(name: str) -> str:
    """ "backbone.4.0.conv1.weight" -> "layer1.0.conv1.weight"."""
    parts = name.removeprefix("module.").removeprefix("backbone.").split(".")
    if parts[0].isdigit() and int(parts[0]) < len(CHILDREN):
        parts[0] = CHILDREN[int(parts[0])]
    return ".".join(parts)
