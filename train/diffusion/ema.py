"""Exponential moving average of a model's weights, the weights that samples are drawn with."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A frozen copy of a model whose parameters trail the trained ones.

    ema <- decay * ema + (1 - decay) * parameter, at every `every`-th optimiser step; before step `start` the copy is
    simply equal to the model, since an average over the first steps would mostly hold the initial weights. Parameters
    and buffers are matched by name; buffers are always copied. Steps are counted from 1.

    model: not wrapped in DistributedDataParallel.
    """

    def __init__(self, model: nn.Module, decay: float = 0.995, every: int = 10, start: int = 2000) -> None:
        if not 0 <= decay < 1 or every < 1:
            raise ValueError(f"EMA needs 0 <= decay < 1 and every >= 1, got decay {decay} and every {every}")
        self.source = model
        self.decay, self.every, self.start = decay, every, start
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # Lists, for one kernel over all parameters instead of one each. They hold the parameters themselves, which
        # keep their identity when modules are moved, converted or loaded.
        self._parameters = _pairs(dict(self.model.named_parameters()), dict(model.named_parameters()))
        self._buffers = _pairs(dict(self.model.named_buffers()), dict(model.named_buffers()))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model after optimiser step `step`."""
        if step >= self.start and step % self.every:
            return
        averages, sources = self._parameters
        if step < self.start:
            torch._foreach_copy_(averages, sources)
        else:
            torch._foreach_lerp_(averages, sources, 1 - self.decay)
        buffers, sources = self._buffers
        if buffers:  # foreach takes no empty lists
            torch._foreach_copy_(buffers, sources)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's own names."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the averaged weights back; errors as `nn.Module.load_state_dict`."""
        self.model.load_state_dict(state)


def _pairs(own: dict[str, Tensor], others: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of both under the same names, in the same order."""
    return list(own.values()), [others[name] for name in own]
