"""torch.hub entry points of MedicalNet, the 3D ResNets of Med3D (Chen et al., arXiv 1904.00625), as feature extractors.

    net = torch.hub.load("warvito_MedicalNet-models_main", "medicalnet_resnet10_23datasets", source="local")
    features = net(volume)  # (B, 1, D, H, W), z-scored -> (B, 512 or 2048, D/8, H/8, W/8)

Every entry point takes `pretrained` (False: random weights), `weights_dir` (folder with the weight file; None: the
folder `medicalnet` beside this file) and `progress` (show a bar while a file is fetched), returns the network in
eval mode, and raises a ValueError that names file, folder and address when the weights can't be had.
"""

from collections.abc import Callable
from pathlib import Path

from medicalnet_models.resnet import MedicalNetResNet
from medicalnet_models.weights import load_weights

dependencies = ["torch"]


def _entry_point(depth: int, file: str, what: str) -> Callable[..., MedicalNetResNet]:
    def build(pretrained: bool = True, weights_dir: str | Path | None = None, progress: bool = True):
        net = MedicalNetResNet(depth)
        if pretrained:
            load_weights(net, depth, file, weights_dir, progress)
        return net.eval()

    build.__doc__ = f"ResNet-{depth}{what}."
    return build


ON_23 = " trained on 23 data sets, "
medicalnet_resnet10 = _entry_point(10, "resnet_10.pth", ", 512 features")
medicalnet_resnet10_23datasets = _entry_point(
    10, "resnet_10_23dataset.pth", f"{ON_23}512 features: the network of the perceptual loss"
)
medicalnet_resnet50 = _entry_point(50, "resnet_50.pth", ", 2048 features")
medicalnet_resnet50_23datasets = _entry_point(50, "resnet_50_23dataset.pth", f"{ON_23}2048 features")
medicalnet_resnet101 = _entry_point(101, "resnet_101.pth", ", 2048 features")
medicalnet_resnet152 = _entry_point(152, "resnet_152.pth", ", 2048 features")
medicalnet_resnet200 = _entry_point(200, "resnet_200.pth", ", 2048 features")
