"""Agreement with what was measured: of decoded volumes, and of latents on the way through sampling."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from AutoEncoder.decoding import decode
from AutoEncoder.encoding import encode
from AutoEncoder.model.autoencoder import Autoencoder
from AutoEncoder.patches import crop_to
from common.errors import UserError
from common.places import is_file
from dataset.degradation.degrading import read_measurement
from dataset.degradation.operators import Measured, Operator
from dataset.volumes.index import beside
from dataset.volumes.volume_io import nifti_to_tensor, tensor_to_nifti
from evaluation.controlled.conditions import Condition

Measurement = tuple[Operator, Measured]


def measurement_of(condition: Condition) -> Measurement:
    """That of the first hint that has one. UserError: none has, or it is damaged."""
    for hint in condition.hints.values():
        if is_file(beside(hint, ".npz")):
            return read_measurement(hint)
    raise UserError(
        f"{condition.first}: data_consistency needs what was measured, NAME.npz and NAME.json as dataset/degrade.py "
        "writes them: make the conditions with it, or leave --data-consistency out"
    )


def agreeing(volume: Tensor, measurement: Measurement) -> Tensor:
    """A volume near this one that agrees with the measurement, (1, D, H, W) in [-1, 1]."""
    operator, measured = measurement
    found = operator.agreeing(tensor_to_nifti(volume[0]).numpy(), measured)
    return nifti_to_tensor(torch.from_numpy(np.ascontiguousarray(found)))[None].contiguous()


def decoded(autoencoder: Autoencoder, latent: Tensor, condition: Condition) -> Tensor:
    """The volume of a latent, in the condition's size. UserError: it has NaN."""
    volume = crop_to(decode(autoencoder, latent), condition.header.tensor_shape)
    if not volume.isfinite().all():
        raise UserError(f"{condition.first}: the models give NaN for it: a training diverged")
    return volume


def agreeing_latents(
    autoencoder: Autoencoder, conditions: Sequence[Condition], measurements: Sequence[Measurement]
) -> Callable[[Tensor], Tensor]:
    """What makes the latents (B, C, d, h, w) of these conditions agree: each is decoded, brought to agree, encoded.

    What that changes is added to the latent: so the error of decoding and encoding, which is often larger, stays out.
    """

    def correct(latents: Tensor) -> Tensor:
        found = []
        for latent, condition, measurement in zip(latents, conditions, measurements, strict=True):
            before = decoded(autoencoder, latent, condition)
            after = agreeing(before, measurement)
            found.append(latent + encode(autoencoder, after) - encode(autoencoder, before))
        return torch.stack(found)

    return correct
