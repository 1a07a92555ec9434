"""Gaussian diffusion over tokens (Ho et al. 2020) or latents: noise schedule, targets, loss.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps        DDPM Eq. 4

Shapes: K tokens in the batch, D = token_dim, M = width of the condition, T diffusion steps; t counts from 0 to T - 1.
"""

import math
from typing import Literal, Protocol, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from rpgcli.config import Config

Target = Literal["eps", "v", "x0"]

REFERENCE_STEPS = 1000
"""The T for which the papers chose beta_start and beta_end."""
MIN_ALPHA_BAR = 1e-30
"""The papers' betas end at 4e-5 for T = 1000 and, raw, at 2e-9 for 2000."""
COSINE_END = 4e-5
"""The last alpha_bar of the cosine schedule: that of the papers' linear one."""


class Denoiser(Protocol):
    """What `Diffusion.loss` needs of a denoiser (see `rpgcli.denoisers`)."""

    def embed(self, c: Tensor) -> Tensor:
        """Embed conditions (K, M)."""
        ...

    def __call__(self, x_t: Tensor, t: Tensor, e: Tensor) -> Tensor:
        """Predict the target (K, D) from tokens (K, D) at steps (K,)."""
        ...


class DiffusionConfig(Config):
    """Noise schedule and what the denoiser predicts."""

    num_steps: PositiveInt = 1000
    """Diffusion steps T during training; sampling may take fewer."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How alpha_bar falls: betas linear in t (DDPM), or a squared cosine (Nichol & Dhariwal 2021)."""
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    """First beta of the linear schedule."""
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    """Last beta of the linear schedule."""
    rescale: bool = True
    """Whether any T covers the linear schedule of 1000 steps. Raw betas end at alpha_bar 0.36 for T = 100, and sampling
    starts off-distribution."""
    target: Target = "v"
    """What the denoiser predicts: the noise, the clean token, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""

    @model_validator(mode="after")
    def _signal_survives(self) -> Self:
        end = self.alpha_bar()[-1].item()
        if end < MIN_ALPHA_BAR:
            raise ValueError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} with num_steps {self.num_steps} leave "
                f"alpha_bar at {end:.0e}, below {MIN_ALPHA_BAR:.0e}, where float32 loses the signal; lower beta_end"
            )
        return self

    def alpha_bar(self) -> Tensor:
        """Fraction of the clean token's variance left after each step: (T,) float64, falling."""
        if self.schedule == "cosine":
            return cosine_alpha_bar(self.num_steps)
        return linear_alpha_bar(self.num_steps, self.beta_start, self.beta_end, rescale=self.rescale)

    def build(self) -> "Diffusion":
        """Build the diffusion, which has no weights."""
        return Diffusion(self)


def linear_alpha_bar(num_steps: int, beta_start: float, beta_end: float, *, rescale: bool) -> Tensor:
    """The linear schedule's alpha_bar (T,) in float64.

    With `rescale`, the 1000-step curve (its logarithm, linear between steps) is read at T evenly spaced points, so that
    every T ends where 1000 steps end. Scaling the betas by 1000 / T instead would take them above 1 for small T.
    """
    reference_steps = REFERENCE_STEPS if rescale else num_steps
    betas = torch.linspace(beta_start, beta_end, reference_steps, dtype=torch.float64)
    log_alpha_bar = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])  # at steps 0 to reference_steps
    at = torch.arange(1, num_steps + 1, dtype=torch.float64) * reference_steps / num_steps
    before = at.ceil().long() - 1
    return torch.lerp(log_alpha_bar[before], log_alpha_bar[before + 1], at - before).exp()


def cosine_alpha_bar(num_steps: int, offset: float = 0.008) -> Tensor:
    """The squared cosine's alpha_bar (T,) in float64.

    The paper reads the cosine down to zero and clips beta at 0.999, so that the end depends on T (2e-9 for 1000, 2e-5
    for 10), and eps-prediction divides by its root. We stop the curve where alpha_bar is `COSINE_END`, for every T.
    """
    start = offset / (1 + offset) * math.pi / 2
    end = math.acos(math.sqrt(COSINE_END) * math.cos(start))
    angle = start + (end - start) * torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    return (angle.cos() / math.cos(start)).square()


class Diffusion(nn.Module):
    """The forward process and the conversions between what a denoiser may predict. Has no parameters and no state."""

    alpha_bar: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.num_steps, self.target = config.num_steps, config.target
        self.register_buffer("alpha_bar", config.alpha_bar(), persistent=False)  # (T,) float64

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise rates sqrt(alpha_bar), sqrt(1 - alpha_bar) at steps (K,), each (K, 1) float32."""
        alpha_bar = self.alpha_bar[t, None]
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise clean tokens (K, D) to steps `t` (K,): DDPM Eq. 4."""
        signal, noise = self.rates(t)
        return signal * x_0 + noise * eps

    def output_target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should have said about `q_sample(x_0, t, eps)`: (K, D)."""
        if self.target == "eps":
            return eps
        if self.target == "x0":
            return x_0
        signal, noise = self.rates(t)
        return signal * eps - noise * x_0

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Read the denoiser's output as estimates of `x_0` and `eps`, each (K, D).

        Both satisfy `x_t = signal x_0 + noise eps`, so that a sampler's step, which weights them by the next rates, has
        none of the rounding that a division by a small `signal` suggests.
        """
        signal, noise = self.rates(t)
        if self.target == "eps":
            return (x_t - noise * output) / signal, output
        if self.target == "x0":
            return output, (x_t - signal * output) / noise
        return signal * x_t - noise * output, noise * x_t + signal * output

    def loss(self, denoiser: Denoiser, x_0: Tensor, c: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error at an independent random step per token: DDPM Eq. 14 over the slots that hold parameters.

        Args:
            denoiser: See `rpgcli.denoisers`.
            x_0: (K, D) clean tokens; padded slots may hold anything.
            c: (K, M) conditions.
            mask: (K, D) bool, false on padded slots.
            generator: Draws steps and noise, on its own device.

        Returns:
            Scalar.
        """
        t, eps = self.draw(x_0.shape, generator)
        return self.loss_at(denoiser, x_0, c, mask, t.to(x_0.device), eps.to(x_0.device))

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random steps (K,) and unit noise of `shape` (K, D)."""
        t = torch.randint(self.num_steps, shape[:1], generator=generator, device=generator.device)  # (K,)
        return t, torch.randn(shape, generator=generator, device=generator.device)  # (K, D)

    def loss_at(
        self,
        denoiser: Denoiser,
        x_0: Tensor,
        c: Tensor,
        mask: Tensor,
        t: Tensor,
        eps: Tensor,
        num_learned: Tensor | int | None = None,
    ) -> Tensor:
        """`loss` at given steps (K,) and noise (K, D). Padded slots are zero for the denoiser and count nowhere.

        Where these tokens are a part of a batch, `num_learned` are the slots that hold parameters in all of it: the
        losses of its parts then sum to that of the batch.
        """
        # fmt: off
        x_0    = x_0.masked_fill(~mask, 0)                                    # (K, D)
        x_t    = self.q_sample(x_0, t, eps).masked_fill(~mask, 0)             # (K, D)
        output = denoiser(x_t, t, denoiser.embed(c))                          # (K, D)
        error  = output.float() - self.output_target(x_0, eps, t)             # (K, D)
        # fmt: on
        return error.masked_fill(~mask, 0).square().sum() / (mask.sum() if num_learned is None else num_learned)
