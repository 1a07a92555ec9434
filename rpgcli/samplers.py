"""From noise to tokens: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), DPM-Solver++(2M) (Lu et al. 2022).

Every sampler walks the same grid of steps from T - 1 down, asks the denoiser once at each, and returns the last
estimate of x_0. Coefficients are float64 numbers, the state is float32. Noise comes from the caller, so that each
sample can have a generator of its own. A new sampler is one class here and one entry of the union.

Shapes: K tokens, D = token_dim, T = diffusion.num_steps.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from rpgcli.config import Config
from rpgcli.diffusion import Denoiser, Diffusion
from rpgcli.errors import UsageError

Denoise = Callable[[Tensor, Tensor], Tensor]
"""The denoiser with its condition in place: x_t (K, D), t (K,) -> output (K, D)."""
Noise = Callable[[], Tensor]
"""Fresh standard normal noise (K, D)."""
OnStep = Callable[[int], None]
"""Called after each step with the number of steps done."""


def time_grid(diffusion_steps: int, num_steps: int) -> Tensor:
    """The steps to visit: (num_steps,) int64, descending from T - 1, all different.

    The last one lies as far from the clean token as all others lie apart.

    Raises:
        UsageError: If `num_steps` is not in 1 .. T.
    """
    if not 1 <= num_steps <= diffusion_steps:
        raise UsageError(
            f"{num_steps} sampling steps are not possible.",
            f"The model was trained with {diffusion_steps} diffusion steps; ask for 1 to {diffusion_steps}.",
        )
    return torch.arange(num_steps, 0, -1) * diffusion_steps // num_steps - 1


class Estimate(NamedTuple):
    """What is known at one step of the grid."""

    alpha_bar: float
    x_t: Tensor
    """(K, D)"""
    x_0: Tensor
    """(K, D) the denoiser's estimate."""
    eps: Tensor
    """(K, D) the noise that goes with it."""


class Sampler(Config):
    """The walk that all samplers share; each says in `advance` how to reach the next step of the grid."""

    @abstractmethod
    def advance(self, now: Estimate, before: Estimate | None, alpha_bar: float, noise: Noise | None) -> Tensor:
        """Go from `now` to the noise level `alpha_bar` < 1: (K, D). `before` is the estimate one step earlier."""

    @torch.no_grad()
    def sample(
        self,
        diffusion: Diffusion,
        denoise: Denoise,
        x_T: Tensor,
        num_steps: int,
        noise: Noise | None = None,
        mask: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Turn noise into clean tokens.

        Args:
            diffusion: The process that the denoiser was trained with.
            denoise: Asked once per step.
            x_T: (K, D) starting noise.
            num_steps: From 1 to T.
            noise: Needed by samplers that add noise on the way.
            mask: (K, D) bool, false on padded slots, which stay zero: left alone they drift into their neighbours.
            on_step: Told after each step how many are done.

        Returns:
            (K, D) float32.

        Raises:
            UsageError: If `num_steps` is not in 1 .. T.
        """
        grid = time_grid(diffusion.num_steps, num_steps)
        alpha_bars = diffusion.alpha_bar.cpu()[grid].tolist()

        def clean(x: Tensor) -> Tensor:
            return x if mask is None else x.masked_fill(~mask, 0)

        x_t, before = clean(x_T.float()), None
        for done, (step, alpha_bar) in enumerate(zip(grid.tolist(), alpha_bars, strict=True), start=1):
            t = torch.full((len(x_t),), step, device=x_t.device)
            now = Estimate(alpha_bar, x_t, *diffusion.predict(denoise(x_t, t).float(), x_t, t))
            last = done == num_steps
            x_t = clean(now.x_0 if last else self.advance(now, before, alpha_bars[done], noise))
            before = now
            if on_step:
                on_step(done)
        return x_t


class DdimConfig(Sampler):
    """Denoising diffusion implicit models: deterministic for eta = 0."""

    kind: Literal["ddim"] = "ddim"
    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise added at each step, as a fraction of what DDPM adds."""

    def advance(self, now: Estimate, before: Estimate | None, alpha_bar: float, noise: Noise | None) -> Tensor:
        """Keep the estimated noise's direction: DDIM Eq. 12."""
        return ddim_step(now, alpha_bar, self.eta, noise)


class DdpmConfig(Sampler):
    """Ancestral sampling: the posterior q(x_s | x_t, x_0), respaced where steps are skipped."""

    kind: Literal["ddpm"] = "ddpm"

    def advance(self, now: Estimate, before: Estimate | None, alpha_bar: float, noise: Noise | None) -> Tensor:
        """Draw from the posterior with its own variance, beta-tilde: what DDIM does for eta = 1."""
        return ddim_step(now, alpha_bar, 1.0, noise)


class DpmSolverConfig(Sampler):
    """DPM-Solver++(2M): deterministic and of second order, for few steps."""

    kind: Literal["dpm-solver++"] = "dpm-solver++"

    def advance(self, now: Estimate, before: Estimate | None, alpha_bar: float, noise: Noise | None) -> Tensor:
        """Integrate the ODE over one interval, x_0 extrapolated linearly in log-SNR from the last two estimates."""
        step, x_0 = half_log_snr(alpha_bar) - half_log_snr(now.alpha_bar), now.x_0
        if before is not None:
            last_step = half_log_snr(now.alpha_bar) - half_log_snr(before.alpha_bar)
            x_0 = x_0 + step / (2 * last_step) * (now.x_0 - before.x_0)
        noise_ratio = math.sqrt((1 - alpha_bar) / (1 - now.alpha_bar))
        return noise_ratio * now.x_t - math.sqrt(alpha_bar) * math.expm1(-step) * x_0


SamplerConfig = Annotated[DdpmConfig | DdimConfig | DpmSolverConfig, Field(discriminator="kind")]


def ddim_step(now: Estimate, alpha_bar: float, eta: float, noise: Noise | None) -> Tensor:
    """Go from `now` to `alpha_bar`: DDIM Eq. 12, its sigma from Eq. 16."""
    sigma = eta * math.sqrt((1 - alpha_bar) / (1 - now.alpha_bar) * (1 - now.alpha_bar / alpha_bar))
    x = math.sqrt(alpha_bar) * now.x_0 + math.sqrt(1 - alpha_bar - sigma**2) * now.eps
    if sigma == 0:
        return x
    assert noise is not None, "this sampler adds noise: its caller has to draw it"
    return x + sigma * noise()


def half_log_snr(alpha_bar: float) -> float:
    """The solver's time: lambda = log(signal rate / noise rate)."""
    return math.log(alpha_bar / (1 - alpha_bar)) / 2


class Denoised(Protocol):
    """What `sample` needs of a model: both methods denoise in the same way."""

    diffusion: Diffusion

    @property
    def denoiser(self) -> Denoiser:
        """See `rpgcli.denoisers`."""
        ...


@torch.no_grad()
def sample(
    model: Denoised, c: Tensor, x_T: Tensor, mask: Tensor, *, sampler: SamplerConfig, num_steps: int, noise: Noise
) -> Tensor:
    """Denoise rows given their prototypes, which are embedded once for all steps.

    Args:
        model: Trained.
        c: Prototypes, (K, M).
        x_T: Starting noise, (K, D).
        mask: What varies, (K, D); the rest stays zero.
        sampler: Which.
        num_steps: Denoising steps.
        noise: Draws the noise of one step, (K, D); used by stochastic samplers only.

    Returns:
        x_0, (K, D).
    """
    e = model.denoiser.embed(c)
    return sampler.sample(model.diffusion, lambda x_t, t: model.denoiser(x_t, t, e), x_T, num_steps, noise, mask)


class SelectionConfig(Config):
    """What is tried on validation tasks to choose how the trained model is sampled."""

    num_tasks: PositiveInt = 102
    """Validation tasks looked at, at most."""
    samplers: tuple[SamplerConfig, ...] = (DdimConfig(),)
    """Samplers tried."""
    num_steps: tuple[PositiveInt, ...] = (2, 5, 10)
    """Numbers of steps tried."""
    temperatures: tuple[NonNegativeFloat, ...] = (0.0, 0.5, 1.0)
    """Scales of the starting noise tried; 0 starts at the centre."""
