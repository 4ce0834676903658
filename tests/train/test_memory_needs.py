"""What a step of each training needs and does at paper size, counted on tensors without data: the documents' tables."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from configs import official_autoencoder
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from AutoEncoder.model.adversarial_training import feature_matching_loss, generator_loss
from AutoEncoder.model.networks import ResBlock
from AutoEncoder.model.PatchVolume import patchvolumeAE
from ddpm.BiFlowNet import BiFlowNet

DOCS = Path(__file__).parents[2] / "docs"
PERFORMANCE = DOCS / "performance.md"
# GB in float32, in bf16, and in both with checkpointing
ROWS = {
    "stage 1, 24 patches of 64³": (49.4, 27.2, 21.9, 11.0),
    "stage 2, one volume of 128 × 256 × 256": (38.8, 22.7, 23.0, 11.5),
    "BiFlowNet, 16 latents of 32³": (32.6, 18.5, 8.0, 4.6),
    "BiFlowNet, one latent of 64³": (16.3, 9.4, 4.6, 2.6),
}
SIZES = {1: (24, 1, 64, 64, 64), 2: (1, 1, 128, 256, 256)}


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that operations make inside and that are there at a time; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._now -= num_bytes


def generator_step(stage: int, checkpointing: bool) -> Callable[[], Tensor]:
    """The generator's loss without the perceptual one, whose network works in chunks."""
    model = patchvolumeAE(official_autoencoder(stage=stage)).train()
    model.volume_discriminator.requires_grad_(False)
    for block in (part for part in model.modules() if isinstance(part, ResBlock)):
        block.recomputes = checkpointing
    x = torch.empty(SIZES[stage])

    def loss() -> Tensor:
        if stage == 1:
            latent = model.encode(x, quantize=False)
        else:
            latent = torch.empty(len(x), 8, *(extent // 8 for extent in x.shape[2:]))
        x_hat = model.decoder(model.post_vq_conv(latent))
        logits, features = model.volume_discriminator(x_hat)
        with torch.no_grad():
            real = model.volume_discriminator(x)[1]
        return (x_hat - x).abs().mean() + generator_loss(logits) + feature_matching_loss(features, real)

    return loss


def denoising_step(batch: int, edge: int, checkpointing: bool) -> Callable[[], Tensor]:
    network = BiFlowNet(dim=72, cond_classes=7, channels=8, patch_size=1).train()
    network.gradient_checkpointing = checkpointing
    x, t = torch.empty(batch, 8, edge, edge, edge), torch.zeros(batch, dtype=torch.long)
    return lambda: (network(x, t, t, torch.ones(3)) - x).abs().mean()


STEPS = dict(
    zip(
        ROWS,
        (
            lambda again: generator_step(1, again),
            lambda again: generator_step(2, again),
            lambda again: denoising_step(16, 32, again),
            lambda again: denoising_step(1, 64, again),
        ),
        strict=True,
    )
)


def counted_gb(name: str, is_half: bool, checkpointing: bool) -> float:
    with FakeTensorMode():
        loss = STEPS[name](checkpointing)
        with PeakMemory() as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                value = loss()
            value.backward()
    return memory.peak / 1e9


def test_the_documents_have_the_table():
    text = PERFORMANCE.read_text()
    for name, figures in ROWS.items():
        assert f"| {name} | {' | '.join(f'{gb:.0f}' for gb in figures)} |" in text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_latent_of_biflownet_needs(checkpointing):
    expected = ROWS["BiFlowNet, one latent of 64³"][1 + 2 * checkpointing]
    assert counted_gb("BiFlowNet, one latent of 64³", True, checkpointing) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_what_a_step_needs(name):
    found = [counted_gb(name, half, again) for again in (False, True) for half in (False, True)]
    assert found == pytest.approx(ROWS[name], rel=0.03)


def test_what_encoding_needs():
    """Eight patches, as many as are encoded at a time."""
    with FakeTensorMode(), torch.no_grad(), PeakMemory() as memory:
        patchvolumeAE(official_autoencoder()).eval().encode(torch.empty(8, 1, 64, 64, 64), quantize=False)
    assert memory.peak / 1e9 == pytest.approx(2.0, rel=0.2)


# row of docs/reproduction.md -> step of so many samples as the row's
OPERATIONS = {
    "stage 1, generator, one patch of 64³ | 1.8e12": ("stage 1, 24 patches of 64³", 24),
    "stage 2, generator, 128 × 256 × 256 | 3.4e13": ("stage 2, one volume of 128 × 256 × 256", 1),
    "BiFlowNet, latent 32³ | 9.5e11": ("BiFlowNet, 16 latents of 32³", 16),
    "BiFlowNet, latent 64³ | 7.6e12": ("BiFlowNet, one latent of 64³", 1),
}


@pytest.mark.parametrize("row", OPERATIONS)
def test_operations_of_a_step(row):
    assert f"| {row} |" in (DOCS / "reproduction.md").read_text()
    name, samples = OPERATIONS[row]
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        STEPS[name](False)().backward()
    assert counter.get_total_flops() / samples == pytest.approx(float(row.rpartition("| ")[2]), rel=0.03)
