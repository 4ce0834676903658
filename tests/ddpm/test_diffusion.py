"""The diffusion process: parity of every formula, losses, sampling options, guidance and interpolation."""

import pytest
import torch
from golden import GOLDEN_SEED, golden_normal, load_golden
from torch import nn

from ddpm.BiFlowNet import BiFlowNet
from ddpm.diffusion import GaussianDiffusion

SHAPE = (1, 8, 8, 8, 8)
TIMESTEPS = [0, 1, 500, 999]


@pytest.fixture(scope="module")
def golden():
    return load_golden("diffusion")


@pytest.fixture(scope="module")
def diffusion():
    return GaussianDiffusion(8)


@pytest.fixture(scope="module")
def data():
    return golden_normal(GOLDEN_SEED, "x0", SHAPE).clamp(-1, 1), golden_normal(GOLDEN_SEED, "noise", SHAPE)


def toy_denoiser(x, t):
    return 0.9 * x + 0.05 * torch.sin(3 * x) + 0.001 * t.reshape(-1, 1, 1, 1, 1) / 1000


class ClassDenoiser(nn.Module):
    """Predicts 0.1 per class id, and remembers what it was called with."""

    def __init__(self, null_label=None):
        super().__init__()
        self.null_label = null_label
        self.calls = []

    def forward(self, x, t, y, res=None):
        self.calls.append({"x": x, "t": t, "y": y, "res": res})
        return 0.1 * y.reshape(-1, 1, 1, 1, 1) * torch.ones_like(x)

    def drop_conditions(self, conditions, is_dropped):
        return {**conditions, "y": conditions["y"].masked_fill(is_dropped, self.null_label)}


# -------------------------------------------------------------------------------------------------------------- parity


def test_golden_buffers(diffusion, golden):
    buffers = dict(diffusion.named_buffers())
    assert [f"buffer/{name}" for name in buffers] == [key for key in golden if key.startswith("buffer/")]
    for name, table in buffers.items():
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, torch.from_numpy(golden[f"buffer/{name}"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_golden_formulas(diffusion, golden, data, timestep):
    x_start, noise = data
    t = torch.tensor([timestep])
    x_t = diffusion.q_sample(x_start, t, noise)
    recovered = diffusion.predict_start_from_noise(x_t, t, noise)
    mean, variance, log_variance = diffusion.p_mean_variance(toy_denoiser, x_t, t)
    for key, value in {"q_sample": x_t, "x0_from_eps": recovered, "p_mean": mean}.items():
        expected = torch.from_numpy(golden[f"{key}/{timestep}"])
        assert (value - expected).abs().max() <= 1e-4 * expected.std(), key
    torch.testing.assert_close(log_variance, torch.from_numpy(golden[f"p_logvar/{timestep}"]))
    assert variance.shape == (1, 1, 1, 1, 1)
    if timestep > 0:
        torch.testing.assert_close(variance.log(), log_variance)


def test_golden_ancestral_loop(golden):
    z = golden_normal(GOLDEN_SEED, "z", SHAPE)
    torch.manual_seed(11)
    sample = GaussianDiffusion(8, timesteps=20).p_sample_loop(toy_denoiser, z)
    expected = torch.from_numpy(golden["ddpm_loop_T20_seeded"])
    assert (sample - expected).abs().max() <= 1e-4 * expected.std()


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(("loss_type", "expected"), [("l1", 0.5), ("l2", 0.25)])
def test_losses_of_a_constant_error(data, loss_type, expected):
    x_start, noise = data
    diffusion = GaussianDiffusion(8, loss_type=loss_type)
    loss = diffusion.p_losses(lambda x, t: noise + 0.5, x_start, torch.tensor([10]), noise=noise)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_loss_denoises_the_noisy_latent_with_its_conditions(diffusion, data):
    x_start, noise = data[0].repeat(2, 1, 1, 1, 1), data[1].repeat(2, 1, 1, 1, 1)
    denoiser, t, y = ClassDenoiser(), torch.tensor([3, 700]), torch.tensor([1, 0])
    loss = diffusion.p_losses(denoiser, x_start, t, y, torch.ones(3), noise)
    (call,) = denoiser.calls
    for sample in range(2):
        alone = diffusion.q_sample(x_start[:1], t[sample : sample + 1], noise[:1])
        torch.testing.assert_close(call["x"][sample : sample + 1], alone)
    assert call["t"] is t
    assert call["y"] is y
    assert call["res"].tolist() == [1, 1, 1]
    expected = ((noise[:1] - 0.1).abs().mean() + noise[:1].abs().mean()) / 2
    torch.testing.assert_close(loss, expected)


def test_loss_draws_its_own_noise(diffusion, data):
    torch.manual_seed(0)
    noise = torch.randn(SHAPE)
    torch.manual_seed(0)
    drawn = diffusion.p_losses(toy_denoiser, data[0], torch.tensor([10]))
    torch.testing.assert_close(drawn, diffusion.p_losses(toy_denoiser, data[0], torch.tensor([10]), noise=noise))


# ----------------------------------------------------------------------------------------------------- range of x_0


def test_predicted_start_is_clipped(diffusion):
    x = torch.linspace(-3, 3, 7).reshape(1, 1, 7, 1, 1)
    assert diffusion.limit_start(x).flatten().tolist() == [-1, -1, -1, 0, 1, 1, 1]


def test_dynamic_threshold_scales_each_sample_by_itself():
    diffusion = GaussianDiffusion(1, use_dynamic_thres=True, dynamic_thres_percentile=0.5)
    calm = torch.tensor([-0.5, 0.25, 0.5, 0.75, 3.0])  # median of |x| 0.5: at least 1 is used
    wild = torch.tensor([-4.0, -1.0, 1.0, 2.0, 3.0])  # median of |x| 2
    limited = diffusion.limit_start(torch.stack([calm, wild]).reshape(2, 1, 5, 1, 1)).reshape(2, 5)
    torch.testing.assert_close(limited[0], torch.tensor([-0.5, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(limited[1], torch.tensor([-1.0, -0.5, 0.5, 1.0, 1.0]))


def test_dynamic_threshold_is_used_in_sampling(data):
    noise = data[1]
    kinds = [GaussianDiffusion(8, timesteps=20, use_dynamic_thres=dynamic) for dynamic in (False, True)]
    clipped, scaled = (kind.sample(lambda x, t: 0.1 * x, noise, strategy="ddim", ddim_steps=4) for kind in kinds)
    assert scaled.abs().max() <= 1
    assert (clipped - scaled).abs().max() > 0.1


def test_unclipped_posterior_mean(diffusion, data):
    x_start, noise = 3 * data[0], data[1]
    t = torch.tensor([500])
    x_t = diffusion.q_sample(x_start, t, noise)
    mean, _, _ = diffusion.p_mean_variance(lambda x, t: noise, x_t, t, clip_denoised=False)
    torch.testing.assert_close(mean, diffusion.q_posterior(x_start, x_t, t)[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ guidance


def test_guidance_in_one_pass_of_both_labels(data):
    z = data[1].repeat(2, 1, 1, 1, 1)
    denoiser = ClassDenoiser(null_label=7)
    y, t = torch.tensor([2, 3]), torch.tensor([5, 5])
    diffusion = GaussianDiffusion(8, timesteps=20)
    mean, _, _ = diffusion.p_mean_variance(denoiser, z, t, y, torch.ones(3), cond_scale=3.0)
    (call,) = denoiser.calls
    assert call["y"].tolist() == [2, 3, 7, 7]
    assert call["x"].shape[0] == call["t"].shape[0] == 4
    assert call["res"].shape == (4, 3)
    guided = 0.7 + 3 * (0.1 * y - 0.7)  # eps_null + s (eps_y - eps_null)
    expected, _, _ = diffusion.p_mean_variance(lambda x, t: guided.reshape(2, 1, 1, 1, 1).expand_as(x), z, t)
    torch.testing.assert_close(mean, expected)


def test_guidance_runs_through_a_network_with_null_label():
    model = BiFlowNet(
        12, False, 2, (1,), channels=2, use_sparse_linear_attn=(0,), resnet_groups=4, DiT_num_heads=2, null_label=True
    )
    diffusion = GaussianDiffusion(2, timesteps=10)
    z, y, res = torch.randn(2, 2, 8, 8, 8), torch.tensor([0, 1]), torch.ones(2, 3) / 8
    samples = [diffusion.sample(model, z, y, res, scale, "ddim", ddim_steps=2) for scale in (1.0, 2.0)]
    assert samples[0].shape == z.shape
    assert (samples[0] - samples[1]).abs().max() > 1e-4
    wrapped = nn.Module()  # as DistributedDataParallel holds it
    wrapped.module, wrapped.forward = model, model.forward
    torch.testing.assert_close(diffusion.sample(wrapped, z, y, res, 2.0, "ddim", ddim_steps=2), samples[1])


class HintDenoiser(ClassDenoiser):
    """Knows a condition that the process has never heard of."""

    def forward(self, x, t, y, hint):
        self.calls.append({"y": y, "hint": hint})
        return hint + 0.1 * y.reshape(-1, 1, 1, 1, 1) * torch.ones_like(x)


def test_any_condition_reaches_the_denoiser(diffusion, data):
    z, y, hint = data[1].repeat(2, 1, 1, 1, 1), torch.tensor([1, 2]), torch.rand(2, 1, 8, 8, 8)
    denoiser, t = HintDenoiser(null_label=7), torch.tensor([3, 5])
    together, singly = {"conditions": {"y": y, "hint": hint}}, {"y": y, "conditions": {"hint": hint}}

    losses = [diffusion.p_losses(denoiser, z, t, noise=z, **given) for given in (together, singly)]
    assert losses == [pytest.approx((hint + 0.1 * y.reshape(2, 1, 1, 1, 1) - z).abs().mean().item(), rel=1e-5)] * 2
    samples = [
        diffusion.sample(denoiser, z, cond_scale=scale, strategy="ddim", ddim_steps=2, **given)
        for scale in (1.0, 3.0)
        for given in (together, singly)
    ]
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=0)
    torch.testing.assert_close(samples[2], samples[3], rtol=0, atol=0)
    assert not torch.equal(samples[0], samples[2])
    for call in denoiser.calls[-2:]:  # with guidance the hint stays, and the label goes in the second half
        assert torch.equal(call["hint"], torch.cat([hint, hint]))
        assert call["y"].tolist() == [1, 2, 7, 7]


def test_each_sample_draws_its_timestep_from_its_own_generator():
    diffusion = GaussianDiffusion(2, timesteps=10)
    seeds = range(2000)
    drawn = diffusion.draw_timesteps([torch.Generator().manual_seed(seed) for seed in seeds])
    assert (drawn.dtype, drawn.min(), drawn.max()) == (torch.int64, 0, 9)
    assert torch.bincount(drawn).tolist() == pytest.approx([200] * 10, abs=60)  # 4.5 standard deviations
    alone = [diffusion.draw_timesteps([torch.Generator().manual_seed(seed)]) for seed in range(20)]
    assert torch.cat(alone).tolist() == drawn[:20].tolist()


def test_no_guidance_is_one_pass_without_null_label(data):
    denoiser = ClassDenoiser(null_label=7)
    GaussianDiffusion(8, timesteps=2).sample(denoiser, data[1], torch.tensor([1]))
    assert [call["y"].tolist() for call in denoiser.calls] == [[1], [1]]


@pytest.mark.parametrize(
    ("denoiser", "y", "message"),
    [
        (ClassDenoiser(), torch.tensor([1]), "without a null label"),
        (ClassDenoiser(null_label=7), None, "no class ids"),
    ],
)
def test_guidance_needs_a_null_label(diffusion, data, denoiser, y, message):
    with pytest.raises(ValueError, match=message):
        diffusion.sample(denoiser, data[1], y, cond_scale=2.0)


# ------------------------------------------------------------------------------------------------------- interpolation


def test_interpolation_of_a_batch():
    diffusion = GaussianDiffusion(2, timesteps=50)
    x1, x2 = -torch.ones(3, 2, 4, 4, 4), 0.5 * torch.ones(3, 2, 4, 4, 4)
    table = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod

    def oracle(x, t):  # knows that the middle is -0.25
        signal, noise = (values[t].reshape(-1, 1, 1, 1, 1) for values in table)
        return (x + 0.25 * signal) / noise

    progress = []
    middle = diffusion.interpolate(oracle, x1, x2, t=30, progress=lambda *step: progress.append(step))
    torch.testing.assert_close(middle, torch.full_like(x1, -0.25), rtol=0, atol=1e-4)
    assert progress == [(done, 31) for done in range(1, 32)]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_interpolation_starts_at_the_noise_level_of_its_timestep(lam):
    diffusion = GaussianDiffusion(1, timesteps=50)
    x1, x2 = torch.zeros(2, 1, 32, 32, 32), torch.full((2, 1, 32, 32, 32), 0.8)
    started = []

    def denoiser(x, t):
        started.append((x, t))
        return torch.zeros_like(x)

    diffusion.interpolate(denoiser, x1, x2, t=25, lam=lam, generator=torch.Generator().manual_seed(0))
    x, t = started[0]
    assert t.tolist() == [25, 25]
    assert len(started) == 26
    assert x.std().item() == pytest.approx(diffusion.sqrt_one_minus_alphas_cumprod[25].item(), rel=0.02)
    assert x.mean().item() == pytest.approx(0.8 * lam * diffusion.sqrt_alphas_cumprod[25].item(), abs=0.02)


def test_interpolation_errors(diffusion):
    x = torch.zeros(1, 8, 4, 4, 4)
    with pytest.raises(ValueError, match="same shape"):
        diffusion.interpolate(toy_denoiser, x, x[:, :, :2])
    with pytest.raises(ValueError, match="between 0 and 999"):
        diffusion.interpolate(toy_denoiser, x, x, t=1000)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "at least 1"),
        ({"channels": 1, "timesteps": 0}, "at least 1"),
        ({"channels": 1, "loss_type": "huber"}, "choose one of l1, l2"),
        ({"channels": 1, "dynamic_thres_percentile": 0}, r"in \(0, 1\]"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**arguments)


def test_latents_of_other_channels_are_refused(diffusion):
    with pytest.raises(ValueError, match=r"z has shape .* expected \(B, 8, d, h, w\)"):
        diffusion.sample(toy_denoiser, torch.zeros(1, 4, 8, 8, 8))
    with pytest.raises(ValueError, match="x_start has shape"):
        diffusion.p_losses(toy_denoiser, torch.zeros(8, 8, 8, 8), torch.zeros(1, dtype=torch.long))


def test_denoiser_of_other_shape_is_refused(diffusion, data):
    with pytest.raises(ValueError, match="noise of the same shape"):
        diffusion.p_losses(lambda x, t: torch.cat([x, x], dim=1), data[0], torch.tensor([0]))


def test_class_ids_are_checked_before_any_work():
    model = BiFlowNet(12, False, 2, (1,), channels=2, use_sparse_linear_attn=(0,), resnet_groups=4, DiT_num_heads=2)
    diffusion, z, y, res = GaussianDiffusion(2), torch.randn(1, 2, 8, 8, 8), torch.tensor([2]), torch.ones(3)
    with pytest.raises(ValueError, match=r"class ids \[2\]: this model knows 0 to 1"):
        diffusion.sample(model, z, y, res)
    with pytest.raises(ValueError, match=r"class ids \[2\]: this model knows 0 to 1"):
        diffusion.p_losses(model, z, torch.tensor([0]), y, res)
