"""Several processes train one autoencoder: the gradients of each optimiser's pass are averaged in its own turn."""

from collections.abc import Callable

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# The networks of each pass, frozen ones too: wrapping them makes all ranks start from rank 0's weights.
PARTS = {
    "generator": ("encoder", "pre_vq_conv", "codebook", "post_vq_conv", "decoder"),
    "discriminator": ("volume_discriminator",),
}


class TwoPassDDPStrategy(DDPStrategy):
    """Wraps the two passes of the autoencoder rather than the autoencoder.

    In each of them every trained parameter gets a gradient, so that none has to be searched for, step by step, as when
    one wrapper holds both networks. Buffers are not sent around: the codebook's are the same everywhere by its own
    sums, and the running statistics of the discriminator's batch norm have no part in training.
    """

    @property
    def root_device(self) -> torch.device:
        """Its only device, if there is one; otherwise, in processes that Lightning has started, by their places."""
        return self.parallel_devices[0] if len(self.parallel_devices) == 1 else super().root_device

    def configure_ddp(self) -> None:
        """Called by `setup` before training, when the model is on its device and stage 2's parts are frozen."""
        model = self.lightning_module
        if model.cfg.model.compile:
            # it would cut compiled networks at the borders of gradient buckets, which recomputed blocks don't allow
            torch._dynamo.config.optimize_ddp = False
        for name, parts in PARTS.items():
            networks = nn.ModuleDict({part: getattr(model, part) for part in parts})
            model.passes[name] = DistributedDataParallel(
                _Pass(networks, model.passes[name]),
                device_ids=self.determine_ddp_device_ids(),
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def teardown(self) -> None:
        model = self.lightning_module
        if model is not None:
            model.passes = model.own_passes()
        super().teardown()


class _Pass(nn.Module):
    """`function`, as a module that has the networks whose parameters it uses."""

    def __init__(self, networks: nn.ModuleDict, function: Callable) -> None:
        super().__init__()
        self.networks = networks
        self.function = function

    def forward(self, *args):
        return self.function(*args)
