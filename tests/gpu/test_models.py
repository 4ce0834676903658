"""On a GPU the networks give the official numbers, whole or in blocks, compiled or not, within the memory allowed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from configs import OFFICIAL_8X, TINY_4X
from golden import GOLDEN_SEED, fill_module, golden_normal, load_golden
from omegaconf import OmegaConf
from torch import nn

from AutoEncoder.model.autoencoder import Autoencoder
from AutoEncoder.model.codebook import Codebook
from AutoEncoder.model.lpips import TriplanarLPIPS
from AutoEncoder.model.MedicalNetPerceptual import MedicalNetPerceptual
from common.compilation import CompiledDenoiser
from common.precision import autocast
from ddpm.BiFlowNet import BiFlowNet
from ddpm.diffusion import GaussianDiffusion

# Of the reference's standard deviation; on a CPU it is 1e-4. Exact arithmetic: with TF32 it would be about 1e-2.
TOLERANCE = 1e-3
SMALL_4X = {"downsample": [4, 4, 4], "n_hiddens": 24, "num_groups": 8, "n_codes": 512}
OFFICIAL_FLOW = {"dim": 72, "cond_classes": 7, "channels": 8, "patch_size": 1}
SMALL_FLOW = {
    "dim": 24,
    "dim_mults": (1, 1, 2),
    "use_sparse_linear_attn": (0, 0, 1),
    "resnet_groups": 8,
    "DiT_num_heads": 4,
    "channels": 4,
    "cond_classes": 2,
    "patch_size": 2,
}


def build_autoencoder(gpu: torch.device, **model) -> Autoencoder:
    return fill_module(Autoencoder(OmegaConf.merge(OFFICIAL_8X, {"model": model}))).eval().to(gpu)


def build_biflownet(gpu: torch.device, **arguments) -> BiFlowNet:
    return fill_module(BiFlowNet(**arguments)).eval().to(gpu)


def assert_close(actual: torch.Tensor, expected: np.ndarray, scale: float | None = None) -> None:
    expected = np.asarray(expected)
    scale = expected.std() if scale is None else scale
    np.testing.assert_allclose(actual.detach().cpu().numpy(), expected, rtol=0, atol=TOLERANCE * scale)


# ---------------------------------------------------------------------------------------------------------- golden data


@pytest.mark.parametrize(
    ("case", "model", "shape"),
    [("ae_8x", {}, (1, 1, 128, 64, 64)), ("ae_4x_small", SMALL_4X, (2, 1, 64, 64, 64))],
)
def test_the_autoencoder_gives_the_official_numbers(gpu, case, model, shape):
    golden, autoencoder = load_golden(case), build_autoencoder(gpu, **model)
    x = golden_normal(GOLDEN_SEED, "x", shape).clamp(-1, 1).to(gpu)
    with torch.no_grad():
        latent = autoencoder.patch_encode(x)
        codes = autoencoder.codebook(latent)["encodings"]
        volume = autoencoder.decode(torch.from_numpy(golden["codes"]).to(gpu), quantize=False)
    assert_close(latent, golden["latent"])
    assert (codes.cpu().numpy() == golden["codes"]).mean() > 0.999  # of two codes equally near rounding takes either
    assert_close(volume[..., ::4, ::4, ::4], golden["volume_sub"])


def test_the_codebook_learns_the_official_numbers(gpu):
    golden, codebook = load_golden("codebook"), Codebook(64, 4, no_random_restart=True)
    fill_module(codebook, prefix="codebook.").train().to(gpu)
    for step in range(3):
        out = codebook(golden_normal(GOLDEN_SEED, f"z{step}", (2, 4, 4, 6, 5)).to(gpu))
        assert_close(out["commitment_loss"], golden["commitment_loss"][step], scale=golden["commitment_loss"][step])
    for name in ("N", "z_avg", "embeddings"):
        assert_close(getattr(codebook, name), golden[name])


@pytest.mark.parametrize(
    ("case", "arguments", "shape", "time", "y", "res", "step"),
    [
        ("biflownet_8x", OFFICIAL_FLOW, (1, 8, 16, 16, 16), [417], [3], [0.25] * 3, 2),
        ("biflownet_small", SMALL_FLOW, (2, 4, 16, 8, 16), [3, 999], [0, 1], [0.25, 0.125, 0.25], 1),
    ],
)
def test_biflownet_gives_the_official_numbers(gpu, case, arguments, shape, time, y, res, step):
    golden, model = load_golden(case), build_biflownet(gpu, **arguments)
    x, noise = (golden_normal(GOLDEN_SEED, key, shape).to(gpu) for key in ("x", "noise"))
    time, y, res = (torch.tensor(values, device=gpu) for values in (time, y, res))
    every = slice(None, None, step)
    with torch.no_grad():
        assert_close(model(x, time, y, res)[:, :, every, every, every], golden["eps"])
    diffusion = GaussianDiffusion(x.shape[1]).to(gpu)
    loss = diffusion.p_losses(model, x.clamp(-1, 1), time, y, res, noise)
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["loss_l1"]), rel=TOLERANCE)
    norm = nn.utils.get_total_norm([value.grad for value in model.parameters() if value.grad is not None])
    assert norm.item() == pytest.approx(float(golden["grad_norm_total"]), rel=TOLERANCE)


def test_the_perceptual_networks_give_the_official_numbers(gpu):
    golden = load_golden("perceptual")
    a = golden_normal(GOLDEN_SEED, "a", (1, 1, 32, 32, 32)).clamp(-1, 1)
    b = (a + 0.3 * golden_normal(GOLDEN_SEED, "b", a.shape)).clamp(-1, 1)
    lpips = TriplanarLPIPS(pretrained=False, fraction=1.0)
    fill_module(lpips.lpips)
    for i in range(5):
        getattr(lpips.lpips, f"lin{i}").model[1].weight.abs_()
    medicalnet = MedicalNetPerceptual(pretrained=False)
    fill_module(medicalnet.net)
    for network, key in ((lpips, "lpips_triplanar_all_slices"), (medicalnet, "medicalnet10_loss")):
        with torch.no_grad():
            loss = network.to(gpu)(a.to(gpu), b.to(gpu))
        assert loss.item() == pytest.approx(float(golden[key]), rel=TOLERANCE)


# ------------------------------------------------------------------------------------------------- blocks and compiling


@pytest.mark.parametrize(("precision", "gigabytes"), [("32", 1.5), ("bf16", 1.0)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_decoding_stays_below_its_limit(gpu, precision, gigabytes, is_compiled):
    """A volume of 128³, of which one pass needs about 3 GB in float32: in blocks, the same within what is allowed."""
    autoencoder = build_autoencoder(gpu)
    codes = torch.randint(8192, (1, 16, 16, 16), generator=torch.Generator().manual_seed(0)).to(gpu)
    with torch.no_grad(), autocast(gpu, precision):
        whole = autoencoder.decode(codes, quantize=False)
        if is_compiled:
            autoencoder.decoder.compile()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        volume = autoencoder.decode(codes, quantize=False, max_bytes=int(gigabytes * 1e9))
    peak = torch.cuda.max_memory_allocated(gpu) - before
    assert peak <= gigabytes * 1e9, f"{peak / 1e9:.2f} GB"
    difference = (volume - whole).std() / whole.std()
    # Random weights amplify rounding, and what is not in float32 is rounded otherwise in blocks.
    assert difference < (1e-4 if precision == "32" else 0.3), f"{difference:.2g} of the standard deviation"


def test_a_limit_above_the_free_memory_is_recovered_from(gpu):
    """As where another process has taken what was free: smaller blocks, until they fit."""
    autoencoder = build_autoencoder(gpu)
    codes = torch.zeros((1, 24, 24, 24), dtype=torch.long, device=gpu)
    filler = fill_memory(gpu, leaving=2_000_000_000)
    with torch.no_grad():
        volume = autoencoder.decode(codes, quantize=False, max_bytes=10**12)
    del filler
    assert volume.shape == (1, 1, 192, 192, 192)
    assert volume.isfinite().all()


def test_patches_are_encoded_on_a_nearly_full_gpu(gpu):
    autoencoder = build_autoencoder(gpu)
    x = torch.zeros(1, 1, 192, 192, 128, device=gpu)
    filler = fill_memory(gpu, leaving=1_500_000_000)
    with torch.no_grad():
        latent = autoencoder.patch_encode_sliding(x, sliding_window=64)
    del filler
    assert latent.shape == (1, 8, 24, 24, 16)


def fill_memory(gpu: torch.device, leaving: int) -> torch.Tensor:
    """A tensor that leaves so many bytes of the GPU free."""
    torch.cuda.empty_cache()
    return torch.empty(torch.cuda.mem_get_info(gpu)[0] - leaving, dtype=torch.uint8, device=gpu)


def test_the_compiled_denoiser_equals_the_eager_one(gpu):
    """Over two grids in turn: each is a CUDA graph of its own, and the first is replayed after the second."""
    model = build_biflownet(gpu, **SMALL_FLOW).requires_grad_(False)
    compiled = CompiledDenoiser(model)
    with torch.inference_mode():
        for step, size in enumerate((8, 16, 8)):
            x = golden_normal(step, "x", (1, 4, size, size, size)).to(gpu)
            conditions = {"y": torch.tensor([1], device=gpu), "res": torch.full((1, 3), size / 64, device=gpu)}
            time = torch.tensor([10 * step], device=gpu)
            expected = model(x, time, **conditions)
            found = compiled(x, time, **conditions)
            assert_close(found, expected.cpu().numpy())


def test_a_volume_in_half_precision_has_no_steps_and_no_seams(gpu):
    autoencoder = build_autoencoder(gpu, **{**TINY_4X, "n_hiddens": 24, "num_groups": 8})
    latent = F.interpolate(golden_normal(0, "latent", (1, 4, 4, 4, 4)), scale_factor=8, mode="trilinear").to(gpu)
    with torch.no_grad():
        full = autoencoder.decode(latent)
        with autocast(gpu, "bf16"):
            whole, blocks = (autoencoder.decode(latent, max_bytes=limit) for limit in (None, 300_000_000))
    for volume in (whole, blocks):
        assert volume.dtype == torch.float32
        assert len(volume.unique()) > 0.2 * volume.numel()
        assert (volume - full).std() < 0.5 * full.std()
    middle = whole.shape[-1] // 2  # where blocks meet
    jump = [(v[..., middle] - v[..., middle - 1]).abs().mean() for v in (whole, blocks)]
    assert jump[1].item() == pytest.approx(jump[0].item(), rel=0.1)
