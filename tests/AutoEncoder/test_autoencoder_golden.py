"""The autoencoder reproduces the numbers and the parameter names of the official release."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from configs import official_autoencoder
from golden import GOLDEN_SEED, fill_module, golden_normal, load_golden, load_keys

from AutoEncoder.model.codebook import Codebook
from AutoEncoder.model.PatchVolume import patchvolumeAE

SMALL_4X = dict(downsample=[4, 4, 4], n_hiddens=24, num_groups=8, n_codes=512)
# The training cases: no perceptual term, a codebook that is already initialised
TRAINING = dict(
    SMALL_4X,
    n_codes=64,
    embedding_dim=4,
    disc_channels=8,
    no_random_restart=True,
    perceptual_weight=0,
    lr=3e-4,
    precision=32,
)


def close(actual, expected, scale=None):
    """Within 1e-4 of the reference's standard deviation (`scale`), the tolerance between machines."""
    expected = np.asarray(expected)
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    assert actual.shape == expected.shape
    scale = expected.std() if scale is None else scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(("keys", "downsample"), [("ae_8x", [8, 8, 8]), ("ae_4x", [4, 4, 4])])
def test_state_dict_is_the_official_one(keys, downsample):
    model = patchvolumeAE(official_autoencoder(downsample=downsample))
    assert [(name, tuple(value.shape)) for name, value in model.state_dict().items()] == list(load_keys(keys).items())


@pytest.mark.parametrize(
    ("case", "model", "shape"),
    [("ae_8x", {}, (1, 1, 128, 64, 64)), ("ae_4x_small", SMALL_4X, (2, 1, 64, 64, 64))],
)
def test_forward_passes(case, model, shape):
    golden = load_golden(case)
    ae = fill_module(patchvolumeAE(official_autoencoder(**model))).eval()
    x = golden_normal(GOLDEN_SEED, "x", shape).clamp(-1, 1)
    with torch.no_grad():
        latent = ae.patch_encode(x)
        quantised = ae.codebook(latent)
        volume = ae.decode(latent, quantize=True)
        logits, features = ae.volume_discriminator(x)
        reconstruction, _ = ae(x)
    close(latent, golden["latent"])
    np.testing.assert_array_equal(quantised["encodings"].numpy(), golden["codes"])
    close(quantised["commitment_loss"], golden["commitment_loss"], scale=golden["commitment_loss"])
    close(quantised["perplexity"], golden["perplexity"], scale=golden["perplexity"])
    close(volume[..., ::4, ::4, ::4], golden["volume_sub"])
    close(volume.mean(), golden["volume_mean"], scale=golden["volume_std"])
    close(volume.std(), golden["volume_std"], scale=golden["volume_std"])
    close(4 * F.l1_loss(reconstruction, x), golden["recon_loss"], scale=golden["recon_loss"])
    close(logits, golden["disc_logits"])
    close(torch.stack([f.mean() for f in features]), golden["disc_feature_means"])
    assert [list(f.shape) for f in features] == golden["disc_feature_shapes"].tolist()


def test_codebook_training_steps():
    golden = load_golden("codebook")
    codebook = Codebook(64, 4, no_random_restart=True)
    fill_module(codebook, prefix="codebook.").train()
    for step in range(3):
        out = codebook(golden_normal(GOLDEN_SEED, f"z{step}", (2, 4, 4, 6, 5)))
        close(out["commitment_loss"], golden["commitment_loss"][step], scale=golden["commitment_loss"][step])
        close(out["perplexity"], golden["perplexity"][step], scale=golden["perplexity"][step])
        if step == 0:
            np.testing.assert_array_equal(out["encodings"].numpy(), golden["codes0"])
    for name in ("N", "z_avg", "embeddings"):
        close(getattr(codebook, name), golden[name])


def train_steps(tmp_path, steps: int, options: dict, shape: tuple, change: float = 0.0):
    """Logged values of each step and the final state, after a relative change of all weights by random `change`."""
    model = fill_module(patchvolumeAE(official_autoencoder(patch_size=32, **TRAINING, **options)))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.mul_(1 + change * torch.randn(parameter.shape, generator=generator))
    batches = [{"data": golden_normal(GOLDEN_SEED, f"batch{i}", shape).clamp(-1, 1)} for i in range(steps)]
    logged = []

    def note(values: dict, **_) -> None:
        if not any("grad_norm" in name for name in values):  # logged by themselves, and not by the reference
            logged.append({name: value.item() for name, value in values.items()})

    model.log_dict = note
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == steps
    return logged, model.state_dict()


@pytest.mark.parametrize(
    ("case", "steps", "exact_steps", "options", "shape"),
    [
        ("train_stage1", 10, 6, dict(stage=1, discriminator_iter_start=3), (2, 1, 32, 32, 32)),
        ("train_stage2", 6, 4, dict(stage=2, discriminator_iter_start=-1), (1, 1, 64, 32, 32)),
    ],
)
def test_first_training_steps(case, steps, exact_steps, options, shape, tmp_path):
    """Steps of both kinds agree to 1e-3; then rounding, which Adam's first steps blow up, decides the digits.

    So the end is compared with what a millionth of the weights does to it, on this machine: the reference may lie no
    further off than a few times that, and a single weight by one step of Adam besides, which goes the other way where
    its gradient is nearly zero.
    """
    golden = load_golden(case)
    logged, state = train_steps(tmp_path, steps, options, shape)
    _, changed = train_steps(tmp_path, steps, options, shape, change=1e-6)
    assert golden["global_step"] == steps
    keys = golden["history_keys"].tolist()
    history = np.array([[values.get(key, np.nan) for key in keys] for values in logged])
    np.testing.assert_array_equal(np.isnan(history), np.isnan(golden["history"]))
    exact = slice(None, exact_steps)
    np.testing.assert_allclose(history[exact], golden["history"][exact], rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(history, golden["history"], rtol=5e-3, atol=0.05)
    for name in [key.removeprefix("final/") for key in golden if key.startswith("final/")]:
        difference = np.abs(state[name].numpy() - golden[f"final/{name}"])
        rounding = np.abs(state[name].numpy() - changed[name].numpy())
        if options["stage"] == 2 and name.startswith(("encoder.", "pre_vq_conv.", "codebook.")):  # frozen
            assert difference.max() <= 1e-6, name
        else:
            assert difference.max() <= 4 * rounding.max() + TRAINING["lr"], name
            assert difference.mean() <= 3 * rounding.mean() + 1e-4, name
