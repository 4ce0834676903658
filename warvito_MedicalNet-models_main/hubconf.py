"""torch.hub entry points of MedicalNet, the 3D ResNets of Med3D (Chen et al., arXiv 1904.00625), as feature extractors.

    net = torch.hub.load("warvito_MedicalNet-models_main", "medicalnet_resnet10_23datasets", source="local")
    features = net(volume)  # (B, 1, D, H, W), z-scored -> (B, 512 or 2048, D/8, H/8, W/8)

Every entry point takes `pretrained` (False: random weights), `weights_dir` (folder with the weight file; None: the
folder `medicalnet` beside this file) and `progress` (show a bar while a file is fetched), returns the network in
eval mode, and raises a ValueError that names file, folder and address when the weights can't be had.
"""

from pathlib import Path

from medicalnet_models.resnet import MedicalNetResNet
from medicalnet_models.weights import load_weights

dependencies = ["torch"]


def _build(depth: int, file: str, pretrained: bool, weights_dir: str | Path | None, progress: bool) -> MedicalNetResNet:
    net = MedicalNetResNet(depth)
    if pretrained:
        load_weights(net, depth, file, weights_dir, progress)
    return net.eval()


def medicalnet_resnet10(
    pretrained: bool = True, weights_dir: str | Path | None = None, progress: bool = True
) -> MedicalNetResNet:
    """ResNet-10, 512 features."""
    return _build(10, "resnet_10.pth", pretrained, weights_dir, progress)


def medicalnet_resnet10_23datasets(
    pretrained: bool = True, weights_dir: str | Path | None = None, progress: bool = True
) -> MedicalNetResNet:
    """ResNet-10 trained on 23 data sets, 512 features: the network of the perceptual loss."""
    return _build(10, "resnet_10_23dataset.pth", pretrained, weights_dir, progress)


def medicalnet_resnet50(
    pretrained: bool = True, weights_dir: str | Path | None = None, progress: bool = True
) -> MedicalNetResNet:
    """ResNet-50, 2048 features."""
    return _build(50, "resnet_50.pth", pretrained, weights_dir, progress)


def medicalnet_resnet50_23datasets(
    pretrained: bool = True, weights_dir: str | Path | None = None, progress: bool = True
) -> MedicalNetResNet:
    """ResNet-50 trained on 23 data sets, 2048 features."""
    return _build(50, "resnet_50_23dataset.pth", pretrained, weights_dir, progress)


def medicalnet_resnet101(
    pretrained: bool = True, weights_dir: str | Path | None = None, progress: bool = True
) -> MedicalNetResNet:
    """ResNet-101, 2048 features."""
    return _build(101, "resnet_101.pth", pretrained, weights_dir, progress)


def medicalnet_resnet152(
    pretrained: bool = True, weights_dir: str | Path | None = None, progress: bool = True
) -> MedicalNetResNet:
    """ResNet-152, 2048 features."""
    return _build(152, "resnet_152.pth", pretrained, weights_dir, progress)


def medicalnet_resnet200(
    pretrained: bool = True, weights_dir: str | Path | None = None, progress: bool = True
) -> MedicalNetResNet:
    """ResNet-200, 2048 features."""
    return _build(200, "resnet_200.pth", pretrained, weights_dir, progress)
