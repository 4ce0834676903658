"""Low-rank adapters of a BiFlowNet (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022).

An adapted layer gives W x + (α/r) B A x with W frozen. A leads down to rank r with the layer's own kernel, B back up by
1³ and is zero at first, so that the network starts as it was. The class table, whose rows for new classes no low rank
would reach, gets a difference of its own. Names are the layers' with `lora_A`, `lora_B`, as other libraries have them.
"""

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from common.convolution import Conv3d
from ddpm.BiFlowNet import BiFlowNet
from ddpm.blocks import CubeConv3d
from ddpm.frozen_base import WithFrozenBase


class LowRank(nn.Module):
    """(α/r) B A x beside a Linear or Conv3d layer; the rank is at most what the layer has."""

    def __init__(self, layer: nn.Linear | nn.Conv3d, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        if isinstance(layer, nn.Linear):
            rank = min(rank, layer.in_features, layer.out_features)
            self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        else:
            rank = min(rank, layer.in_channels, layer.out_channels)
            shape = dict(kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding)
            self.lora_A = Conv3d(layer.in_channels, rank, **shape, bias=False)
            self.lora_B = nn.Conv3d(rank, layer.out_channels, kernel_size=1, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.lora_B(self.lora_A(x))

    def difference(self) -> Tensor:
        """What it adds to the layer's weight, (out, in) or (out, in, k, k, k)."""
        product = self.lora_B.weight.flatten(1) @ self.lora_A.weight.flatten(1)
        return self.scale * product.unflatten(1, self.lora_A.weight.shape[1:])


class TableDifference(nn.Module):
    """What is added to the rows (B, K) of an embedding for ids (B,)."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.scale = 1.0
        self.lora_embedding = nn.Embedding(table.num_embeddings, table.embedding_dim)
        nn.init.zeros_(self.lora_embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * self.lora_embedding(ids)

    def difference(self) -> Tensor:
        return self.scale * self.lora_embedding.weight


class Adapter(nn.Module):
    """The differences of all adapted layers of a BiFlowNet, each under the layer's name.

    Args:
        rank, alpha: r and α.
        blocks: beginnings of the names of the layers that are adapted, e.g. "downs"; none: all Linear and Conv3d.

    Raises:
        ValueError: a block that the network doesn't have.
    """

    def __init__(self, biflownet: BiFlowNet, rank: int, alpha: float, blocks: Sequence[str] = ()) -> None:
        super().__init__()
        layers = {name: layer for name, layer in biflownet.named_modules() if _can_be_adapted(layer)}
        for block in blocks:
            if not any(_lies_in(name, block) for name in layers):
                known = ", ".join(dict.fromkeys(name.split(".")[0] for name in layers))
                raise ValueError(f"block {block!r}: the network has {known}.")
        for name, layer in layers.items():
            if not blocks or any(_lies_in(name, block) for block in blocks):
                _place(self, name, LowRank(layer, rank, alpha))
        _place(self, "cond_emb", TableDifference(biflownet.cond_emb))

    def differences(self) -> dict[str, LowRank | TableDifference]:
        """By the names of the layers that they belong to."""
        return {name: part for name, part in self.named_modules() if isinstance(part, LowRank | TableDifference)}

    def strengthen(self, factor: float) -> None:
        """Multiply all that it adds."""
        for part in self.differences().values():
            part.scale *= factor


class AdaptedBiFlowNet(WithFrozenBase):
    """A BiFlowNet with adapters, of which the first trains. Its own layers and weights stay as they are."""

    def __init__(self, biflownet: BiFlowNet, *adapters: Adapter) -> None:
        super().__init__(_with_weights_shared(biflownet))
        self.__dict__["plain"] = biflownet  # no module of this one: the same weights without adapters
        self.adapters = nn.ModuleList(adapters)
        for adapter in adapters:
            for name, part in adapter.differences().items():
                self.biflownet.get_submodule(name).register_forward_hook(_Addition(part))

    @property
    def part(self) -> Adapter:
        return self.adapters[0]

    def with_part(self, part: Adapter) -> "AdaptedBiFlowNet":
        return AdaptedBiFlowNet(self.plain, part, *self.adapters[1:])

    def forward(self, *args: Tensor, **conditions: Tensor) -> Tensor:
        """As `BiFlowNet.forward`."""
        return self.biflownet(*args, **conditions)

    @torch.no_grad()
    def merged(self) -> BiFlowNet:
        """A BiFlowNet of the same numbers without adapters, rounding aside."""
        network = copy.deepcopy(self.plain)
        for adapter in self.adapters:
            for name, part in adapter.differences().items():
                network.get_submodule(name).weight += part.difference()
        return network


class _Addition:
    """A hook that adds a part's output for the same input; copies of the network get copies of it and the part."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.part(*args)


def _can_be_adapted(layer: nn.Module) -> bool:
    """The tokens' embedding is left alone: it stays in float32 where others are in half precision."""
    return isinstance(layer, nn.Linear | nn.Conv3d) and not isinstance(layer, CubeConv3d)


def _lies_in(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register a module under a name with dots."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    root.add_module(last, module)


def _with_weights_shared(network: BiFlowNet) -> BiFlowNet:
    """A copy of the modules, to which hooks can be added, with the very same parameters."""
    tensors = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
