"""The diffusion process on normalised latents."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm import predictions, samplers, schedule
from ddpm.denoiser import Conditions, all_conditions, check_latent, conditioned, predict
from ddpm.latent_process import LatentProcess
from ddpm.latent_scaling import LatentScaling
from ddpm.schedule import Denoise, Generator, Limit, NoiseSchedule, Progress
from ddpm.timesteps import draw_fractions


class GaussianDiffusion(LatentProcess):
    """Denoising diffusion with a cosine schedule (Wang et al., IEEE TMI 2025, section III-B).

    Holds the schedule as float32 buffers and no parameters. The denoiser is an argument of each method that needs one:
    ``denoise_fn(x, t, **conditions)``, like x, what ``prediction`` says. The conditions of a batch travel as one
    mapping from names to tensors; y and res are two of them, which can also be given singly.

    Args:
        channels: channels of the latents, C.
        timesteps: T, number of noise levels.
        loss_type: 'l1' or 'l2', the norm of the prediction's error.
        use_dynamic_thres: keep predicted x_0 in range by each sample's own percentile rather than by clipping.
        dynamic_thres_percentile: that percentile, as a fraction in (0, 1].
        prediction: what the denoiser predicts: 'noise', 'v' or 'x0' (``ddpm/predictions.py``).
        loss_weighting: of the losses at each timestep: 'none', 'min_snr' or 'x0' (``error_factors`` there).
        timestep_draw, scaling: as of ``LatentProcess``. Methods on x_t, that is all but p_losses, sample and
            interpolate, take and give latents as the network sees them.

    Shapes: x, noise (B, C, d, h, w); t (B,) int64 in [0, T); y (B,) class ids; res (3,) or (B, 3); other conditions
    (B, ...).

    Raises:
        ValueError: an argument out of range.
    """

    fast_strategy = "ddim"  # of previews

    def __init__(
        self,
        channels,
        timesteps=1000,
        loss_type="l1",
        use_dynamic_thres=False,
        dynamic_thres_percentile=0.9,
        prediction="noise",
        loss_weighting="none",
        timestep_draw="uniform",
        scaling: LatentScaling | None = None,
    ):
        super().__init__(channels, timesteps, loss_type, timestep_draw, scaling)
        if prediction not in predictions.PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}: choose one of {', '.join(predictions.PREDICTIONS)}.")
        if loss_weighting not in predictions.LOSS_WEIGHTINGS:
            known = ", ".join(predictions.LOSS_WEIGHTINGS)
            raise ValueError(f"loss_weighting is {loss_weighting!r}: choose one of {known}.")
        if not 0 < dynamic_thres_percentile <= 1:
            raise ValueError(f"dynamic_thres_percentile is {dynamic_thres_percentile}: it has to lie in (0, 1].")
        self.prediction = prediction
        self.use_dynamic_thres = use_dynamic_thres
        self.dynamic_thres_percentile = dynamic_thres_percentile
        for name, table in schedule.noise_schedule(schedule.cosine_betas(timesteps))._asdict().items():
            self.register_buffer(name, table)
        factors = predictions.error_factors(loss_weighting, prediction, self.schedule)
        self.register_buffer("error_factors", factors, persistent=False)

    @property
    def schedule(self) -> NoiseSchedule:
        """The buffers as the schedule that samplers work on."""
        return NoiseSchedule(*(getattr(self, name) for name in NoiseSchedule._fields))

    # ------------------------------------------------------------------------------------------------------- formulas

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noisy x_t of clean x_start; noise None: drawn."""
        return self.schedule.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x_0 that this noise implies, unclipped."""
        return self.schedule.predict_start_from_noise(x_t, t, noise)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of x_{t-1} given x_t and x_0; the latter two (B, 1, 1, 1, 1)."""
        return self.schedule.q_posterior(x_start, x_t, t)

    def limit_start(self, x_start: Tensor) -> Tensor:
        """Keep a predicted x_0 within [-1, 1], the range of normalised latents."""
        x_start = self.restored(x_start)
        if self.use_dynamic_thres:
            return self.scaled(schedule.dynamic_threshold(x_start, self.dynamic_thres_percentile))
        return self.scaled(schedule.clip_start(x_start))

    def _limit(self, clip_denoised: bool) -> Limit:
        return self.limit_start if clip_denoised else (lambda x_start: x_start)

    # -------------------------------------------------------------------------------------------------------- training

    def draw_timesteps(self, generators: Sequence[torch.Generator]) -> Tensor:
        """A timestep to train each sample at, (B,), by the sample's own generator and on its device."""
        if self.timestep_draw != "uniform":
            return self.timesteps_at(draw_fractions(self.timestep_draw, generators))
        timesteps = torch.empty(len(generators), dtype=torch.int64, device=generators[0].device)
        for place, generator in enumerate(generators):  # in place: a small kernel less for each, and no copies
            timesteps[place].random_(self.num_timesteps, generator=generator)
        return timesteps

    def timesteps_at(self, fractions: Tensor) -> Tensor:
        """Timesteps (B,) at fractions (B,) of the way from data to noise, in [0, 1)."""
        return (fractions * self.num_timesteps).long()

    def _output_and_target(
        self, denoise_fn, x_start: Tensor, t: Tensor, noise: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        """Both with the factor of ``loss_weighting``."""
        output = predict(denoise_fn, self.q_sample(x_start, t, noise), t, conditions)
        target = predictions.target(self.prediction, self.schedule, x_start, t, noise)
        if self.error_factors is not None:
            factor = schedule.at_timestep(self.error_factors, t, x_start)
            output, target = factor * output, factor * target
        return output, target

    # -------------------------------------------------------------------------------------------------------- sampling

    def _denoise(self, denoise_fn, x: Tensor, conditions: Conditions, cond_scale: float) -> Denoise:
        """The noise predictor that samplers work on; the one place where a prediction becomes noise."""
        output = conditioned(denoise_fn, x, conditions, cond_scale)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return predictions.implied_noise(self.prediction, self.schedule, x, t, output(x, t))

        return denoise

    @torch.no_grad()
    def p_mean_variance(
        self, denoise_fn, x, t, y=None, res=None, cond_scale=1.0, clip_denoised=True, conditions=None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of the model's x_{t-1} given x_t."""
        noise = self._denoise(denoise_fn, x, all_conditions(conditions, y, res), cond_scale)(x, t)
        x_start = self._limit(clip_denoised)(self.predict_start_from_noise(x, t, noise))
        return self.q_posterior(x_start, x, t)

    @torch.no_grad()
    def p_sample(
        self, denoise_fn, x, t, y=None, res=None, cond_scale=1.0, clip_denoised=True, generator=None, conditions=None
    ) -> Tensor:
        """One ancestral step, from timesteps t (B,) to t - 1."""
        noise = self._denoise(denoise_fn, x, all_conditions(conditions, y, res), cond_scale)(x, t)
        return samplers.ancestral_step(x, t, noise, self.schedule, self._limit(clip_denoised), generator)

    @torch.no_grad()
    def p_sample_ddim(
        self,
        denoise_fn,
        x,
        t,
        t_next,
        y=None,
        res=None,
        cond_scale=1.0,
        eta=0.0,
        clip_denoised=True,
        generator=None,
        conditions=None,
    ) -> Tensor:
        """One DDIM step, from timesteps t (B,) to t_next (B,); t_next = -1 is clean data."""
        noise = self._denoise(denoise_fn, x, all_conditions(conditions, y, res), cond_scale)(x, t)
        return samplers.ddim_step(x, t, t_next, noise, self.schedule, self._limit(clip_denoised), eta, generator)

    def p_sample_loop(self, denoise_fn, z, y=None, res=None, cond_scale=1.0, **options) -> Tensor:
        """All T ancestral steps from noise z: ``sample`` with strategy 'ddpm' and further options of it."""
        return self.sample(denoise_fn, z, y, res, cond_scale, "ddpm", **options)

    @torch.no_grad()
    def sample(
        self,
        denoise_fn,
        z: Tensor,
        y: Tensor | None = None,
        res: Tensor | None = None,
        cond_scale: float = 1.0,
        strategy: str = "ddpm",
        eta: float = 0.0,
        ddim_steps: int = 100,
        generator: Generator = None,
        progress: Progress | None = None,
        clip_denoised: bool = True,
        conditions: Conditions | None = None,
        correct: Limit | None = None,
        correct_last: int = 0,
    ) -> Tensor:
        """Normalised latents like z (B, C, d, h, w) from standard normal noise z.

        Args:
            cond_scale: guidance scale s, eps_null + s (eps_y - eps_null) (Ho & Salimans 2021); 1 is no guidance. Other
                values need a denoiser with a null label (``BiFlowNet(..., null_label=True)``).
            strategy: name of a sampler, see ``ddpm/samplers.py``: 'ddpm' takes all T timesteps, 'ddim', 'dpm++' and
                'unipc' take ``ddim_steps`` of them; the latter two need the package diffusers.
            eta: share of the posterior's standard deviation that DDIM adds as noise in each step, 0 to 1.
            ddim_steps: number of steps of every strategy but 'ddpm', 1 to T.
            generator: source of the noise that 'ddpm', and 'ddim' with eta above 0, draw: one for all, one per sample,
                or None for the global one.
            progress: called as progress(steps done, steps in all) after each step.
            clip_denoised: keep predicted x_0 in range (``limit_start``); False is for data without a range.
            conditions: what the denoiser is given, y and res among it or apart.
            correct: what the predicted x_0, normalised latents like z, is replaced with in the last `correct_last`
                steps, e.g. those that agree with a measurement.

        Raises:
            ValueError: unknown strategy, ddim_steps, eta or correct_last out of range, wrong shape of z, class ids that
                the denoiser does not know, guidance without a null label, diffusers missing.
        """
        check_latent(z, "z", self.channels)
        sampler = samplers.get_sampler(strategy)
        if eta != 0 and "eta" not in sampler.options:
            warnings.warn(f"eta has no effect with the sampling strategy {strategy!r}.", stacklevel=2)
        given = {"ddim_steps": ddim_steps, "eta": eta}
        options = {argument: given[option] for option, argument in sampler.options.items()}
        steps = ddim_steps if "ddim_steps" in sampler.options else self.num_timesteps
        options["limit"] = self.corrected(self._limit(clip_denoised), correct, correct_last, steps)
        denoise = self._denoise(denoise_fn, z, all_conditions(conditions, y, res), cond_scale)
        return self.restored(sampler.run(denoise, z, self.schedule, generator=generator, progress=progress, **options))

    @torch.no_grad()
    def interpolate(
        self,
        denoise_fn,
        x1,
        x2,
        y=None,
        res=None,
        t=None,
        lam=0.5,
        cond_scale=1.0,
        generator=None,
        progress=None,
        conditions=None,
    ) -> Tensor:
        """Latents between x1 and x2 (B, C, d, h, w), lam in [0, 1] of the way (Ho et al. 2020, section 4.4).

        Both are noised to timestep t (an int; None: T - 1) with the same noise, mixed, and denoised by ancestral
        sampling. The higher t, the more the model decides.
        """
        check_latent(x1, "x1", self.channels)
        if x1.shape != x2.shape:
            raise ValueError(f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} need the same shape to be interpolated.")
        start = self.num_timesteps - 1 if t is None else int(t)
        if not 0 <= start < self.num_timesteps:
            raise ValueError(f"t is {start}: it has to lie between 0 and {self.num_timesteps - 1}.")
        times = torch.full((len(x1),), start, device=x1.device, dtype=torch.long)
        # Two independent noises would partly cancel in the mix, and leave less noise than timestep t has.
        mixed = self.q_sample(self.scaled(torch.lerp(x1, x2, lam)), times, samplers.noise_like(x1, generator))
        denoise = self._denoise(denoise_fn, x1, all_conditions(conditions, y, res), cond_scale)
        x = samplers.ancestral(denoise, mixed, self.schedule, self.limit_start, generator, progress, start=start)
        return self.restored(x)
