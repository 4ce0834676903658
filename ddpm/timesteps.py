"""How the timesteps of a training are spread over (0, 1), from clean data to noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

TIMESTEP_DRAWS = ("uniform", "logit_normal")


def check_timestep_draw(draw: str) -> None:
    if draw not in TIMESTEP_DRAWS:
        raise ValueError(f"timestep_draw is {draw!r}: choose one of {', '.join(TIMESTEP_DRAWS)}.")


def draw_fractions(draw: str, generators: Sequence[torch.Generator]) -> Tensor:
    """One number in (0, 1) for each sample, float64, (B,), by the sample's own generator and on its device.

    'uniform', or 'logit_normal': the sigmoid of a standard normal number, most often near the middle (Esser et al.,
    "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024, eq. 19 with m = 0, s = 1).
    """
    drawn = torch.empty(len(generators), dtype=torch.float64, device=generators[0].device)
    for place, generator in enumerate(generators):  # in place: a small kernel less for each, and no copies
        if draw == "uniform":
            drawn[place].uniform_(generator=generator)
        else:
            drawn[place].normal_(generator=generator)
    return drawn if draw == "uniform" else drawn.sigmoid()
