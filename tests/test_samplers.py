import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from rpgcli import rng
from rpgcli.denoisers.conv import ConvDenoiserConfig
from rpgcli.diffusion import Diffusion, DiffusionConfig, Target
from rpgcli.errors import UsageError
from rpgcli.samplers import (
    DdimConfig,
    DdpmConfig,
    Denoise,
    DpmSolverConfig,
    Estimate,
    Noise,
    Sampler,
    SamplerConfig,
    time_grid,
)
from rpgcli.targets.torchvision_shim import import_torchvision

SAMPLERS: list[Sampler] = [kind() for kind in get_args(get_args(SamplerConfig)[0])] + [DdimConfig(eta=0.5)]
DETERMINISTIC: list[Sampler] = [DdimConfig(), DpmSolverConfig()]
TARGETS = get_args(Target)
MU, DEVIATION = 0.7, 0.3


def name(sampler: Sampler) -> str:
    return str(sampler.model_dump())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng.stream(seed, "test"))


def noise_like(x: Tensor, seed: int = 0) -> Noise:
    generator = rng.stream(seed, "noise")
    return lambda: torch.randn(x.shape, generator=generator)


def knows(diffusion: Diffusion, estimate_x_0: Any) -> Denoise:
    """A denoiser for any target that estimates the clean token as `estimate_x_0(x_t, alpha_bar)`."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = diffusion.alpha_bar[t, None]
        x_0 = estimate_x_0(x_t.double(), alpha_bar)
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        return diffusion.output_target(x_0, eps, t)

    return denoise


def gaussian_posterior_mean(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """E[x_0 | x_t] where x_0 is N(MU, DEVIATION^2): the best denoiser there is."""
    variance = DEVIATION**2
    return (MU * (1 - alpha_bar) + variance * alpha_bar.sqrt() * x_t) / (alpha_bar * variance + 1 - alpha_bar)


def ode_solution(diffusion: Diffusion, x_T: Tensor) -> Tensor:
    """Where the probability flow carries `x_T` under the best denoiser: equal quantiles of equal distributions."""
    alpha_bar = diffusion.alpha_bar[-1].item()
    return MU + DEVIATION * (x_T - math.sqrt(alpha_bar) * MU) / math.sqrt(alpha_bar * DEVIATION**2 + 1 - alpha_bar)


# ------------------------------------------------------------------ the grid


@given(st.data())
def test_every_grid_descends_from_the_noisiest_step_without_repeats(data: st.DataObject) -> None:
    diffusion_steps = data.draw(st.integers(1, 2000))
    num_steps = data.draw(st.integers(1, diffusion_steps))
    grid = time_grid(diffusion_steps, num_steps)
    assert grid.dtype == torch.int64
    assert grid[0] == diffusion_steps - 1
    assert len(grid) == num_steps
    assert (grid.diff() < 0).all()
    assert grid[-1] >= 0


def test_the_grid_of_all_steps_is_every_step_and_others_are_evenly_spaced() -> None:
    assert time_grid(1000, 1000).equal(torch.arange(999, -1, -1))
    assert time_grid(1000, 5).tolist() == [999, 799, 599, 399, 199]
    assert time_grid(10, 3).tolist() == [9, 5, 2]


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(UsageError, match="ask for 1 to 1000"):
        time_grid(1000, num_steps)


# ------------------------------------------------------------------ exact


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 100])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
def test_with_exact_noise_every_sampler_recovers_x0(sampler: Sampler, target: Target, num_steps: int) -> None:
    diffusion = DiffusionConfig(num_steps=100, target=target).build()
    x_0, x_T = draw(6, 4, seed=1), draw(6, 4, seed=2)
    sampled = sampler.sample(diffusion, knows(diffusion, lambda *_: x_0), x_T, num_steps, noise_like(x_T))
    # float32 over signal rates down to 0.006, in one step from pure noise
    torch.testing.assert_close(sampled, x_0, rtol=0, atol=2e-4)


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=name)
def test_with_exact_noise_deterministic_samplers_stay_on_the_line_from_noise_to_x0(sampler: Sampler) -> None:
    diffusion = DiffusionConfig(num_steps=100).build()
    x_0, eps = draw(6, 4, seed=1), draw(6, 4, seed=2)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        torch.testing.assert_close(x_t, diffusion.q_sample(x_0, t, eps), rtol=0, atol=1e-5)
        return diffusion.output_target(x_0, eps, t)

    x_T = diffusion.q_sample(x_0, torch.full((6,), 99), eps)
    torch.testing.assert_close(sampler.sample(diffusion, denoise, x_T, 13), x_0, rtol=0, atol=1e-5)


def test_ddpm_draws_from_the_respaced_posterior() -> None:
    """Mean and variance of q(x_s | x_t, x_0) (DDPM Eq. 7), with the beta between the two steps that are visited."""
    x_t, x_0 = draw(5, 3, seed=1).double(), draw(5, 3, seed=2).double()
    for now, then in ((4e-5, 0.01), (0.2, 0.5), (0.98, 0.999)):
        alpha, eps = now / then, (x_t - math.sqrt(now) * x_0) / math.sqrt(1 - now)
        mean = (math.sqrt(then) * (1 - alpha) * x_0 + math.sqrt(alpha) * (1 - then) * x_t) / (1 - now)
        deviation = math.sqrt((1 - then) / (1 - now) * (1 - alpha))
        for z in (torch.zeros(5, 3), torch.ones(5, 3)):
            sampled = DdpmConfig().advance(Estimate(now, x_t, x_0, eps), None, then, lambda z=z: z)  # type: ignore[misc]
            torch.testing.assert_close(sampled, mean + deviation * z)


# ------------------------------------------------------------------ analytic


@pytest.mark.parametrize(
    ("sampler", "num_steps", "narrowing"),
    [
        # Skipping steps narrows the result: beta-tilde is the smallest variance, and the last step jumps to the mean.
        (DdpmConfig(), 1000, 0.015),
        (DdpmConfig(), 100, 0.10),
        (DdimConfig(), 1000, 0.008),
        (DdimConfig(), 50, 0.10),
        (DdimConfig(eta=0.5), 1000, 0.01),
        (DpmSolverConfig(), 1000, 0.001),
        (DpmSolverConfig(), 50, 0.02),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_gaussian_data_come_back_with_their_mean_and_deviation(
    sampler: Sampler, num_steps: int, narrowing: float, schedule: Any
) -> None:
    diffusion = DiffusionConfig(schedule=schedule).build()
    x_T = draw(4, 10_000)
    x_T = (x_T - x_T.mean()) / x_T.std()  # so that only noise added on the way leaves sampling error
    sampled = sampler.sample(diffusion, knows(diffusion, gaussian_posterior_mean), x_T, num_steps, noise_like(x_T))
    # 0.0044 deviations because x_T lacks the mean's last trace, and three standard errors of 40,000 draws
    assert sampled.mean().item() == pytest.approx(MU, abs=(0.0045 + 0.015) * DEVIATION)
    assert -narrowing - 0.001 < sampled.std().item() / DEVIATION - 1 < 0.011


def ode_error(sampler: Sampler, num_steps: int) -> float:
    diffusion, x_T = DiffusionConfig().build(), draw(1, 1000)
    sampled = sampler.sample(diffusion, knows(diffusion, gaussian_posterior_mean), x_T, num_steps)
    return (sampled - ode_solution(diffusion, x_T)).square().mean().sqrt().item()


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_dpm_solver_is_closer_to_the_ode_than_ddim(num_steps: int) -> None:
    assert ode_error(DpmSolverConfig(), num_steps) < ode_error(DdimConfig(), num_steps)


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=name)
def test_deterministic_samplers_converge_to_the_ode(sampler: Sampler) -> None:
    errors = [ode_error(sampler, num_steps) for num_steps in (10, 40, 160)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


# ------------------------------------------------------------------ agreement with diffusers


def wavy(x_t: Tensor, t: Tensor) -> Tensor:
    """A fixed nonlinear function in a denoiser's place."""
    return torch.tanh(0.8 * x_t + t[:, None] / 1000) + 0.3 * x_t.flip(-1)


def trajectory(sampler: Sampler, target: Target, x_T: Tensor, num_steps: int) -> list[Tensor]:
    diffusion, visited = DiffusionConfig(target=target).build(), list[Tensor]()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        visited.append(x_t)
        return wavy(x_t, t)

    x_0 = sampler.sample(diffusion, denoise, x_T, num_steps, noise_like(x_T))
    return [*visited, x_0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50, 1000])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sampler", [DdpmConfig(), DdimConfig(), DdimConfig(eta=0.5), DpmSolverConfig()], ids=name)
def test_every_step_agrees_with_diffusers(sampler: Sampler, target: Target, num_steps: int) -> None:
    import_torchvision()
    import diffusers

    settings: dict[str, Any] = {
        "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing",
        "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[target],
    }  # fmt: skip
    oracle: Any
    if isinstance(sampler, DdpmConfig):
        oracle, settings = diffusers.DDPMScheduler, settings | {"clip_sample": False}
    elif isinstance(sampler, DdimConfig):
        oracle, settings = diffusers.DDIMScheduler, settings | {"clip_sample": False}
    else:
        oracle = diffusers.DPMSolverMultistepScheduler
    scheduler = oracle(**settings)
    scheduler.set_timesteps(num_steps)
    x_T = draw(8, 6)
    extra: dict[str, Any] = {} if isinstance(sampler, DpmSolverConfig) else {"generator": rng.stream(0, "noise")}
    if isinstance(sampler, DdimConfig):
        extra["eta"] = sampler.eta

    expected = [x_T]
    for t in scheduler.timesteps:
        output = wavy(expected[-1], t.expand(8))
        expected.append(scheduler.step(output, t, expected[-1], **extra).prev_sample)
    for ours, theirs in zip(trajectory(sampler, target, x_T, num_steps), expected, strict=True):
        # They multiply alphas in float32: 1e-5 in alpha_bar, and the estimates grow with the distance from the data.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


# ------------------------------------------------------------------ the contract


@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
def test_padded_slots_stay_zero_and_reach_no_neighbour(sampler: Sampler) -> None:
    diffusion = DiffusionConfig(num_steps=20).build()
    with rng.initialising(0):
        denoiser = ConvDenoiserConfig(channels=(1, 4, 1), norm="none").build(10, 0).eval()
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, 6:] = False
    e = denoiser.embed(torch.zeros(3, 0))
    results = []
    for rubbish in (0.0, 1e6):
        x_T = draw(3, 10).masked_fill(~mask, rubbish)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            assert not x_t[~mask].any()
            output: Tensor = denoiser(x_t, t, e)
            return output

        results.append(sampler.sample(diffusion, denoise, x_T, 5, noise_like(x_T), mask))
    assert results[0].equal(results[1])
    assert not results[0][~mask].any()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
def test_a_sample_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    diffusion = DiffusionConfig(num_steps=20).build()
    x_T, noises = draw(3, 6), [[draw(1, 6, seed=100 * row + step) for step in range(5)] for row in range(3)]

    def sample(rows: list[int]) -> Tensor:
        steps = iter(range(5))

        def noise() -> Tensor:
            step = next(steps)
            return torch.cat([noises[row][step] for row in rows])

        return sampler.sample(diffusion, wavy, x_T[rows], 5, noise)

    torch.testing.assert_close(sample([0, 1, 2])[1:2], sample([1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
def test_samplers_ask_once_per_step_tell_progress_and_need_no_gradient(sampler: Sampler) -> None:
    diffusion, asked, told = DiffusionConfig(num_steps=20).build(), list[int](), list[int]()
    scale = torch.ones((), requires_grad=True)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        asked.append(int(t[0]))
        return (x_t * scale).bfloat16()

    x_T = draw(2, 6)
    sampled = sampler.sample(diffusion, denoise, x_T, 4, noise_like(x_T), on_step=told.append)
    assert asked == [19, 14, 9, 4]
    assert told == [1, 2, 3, 4]
    assert sampled.dtype == torch.float32
    assert not sampled.requires_grad
    assert TypeAdapter[Any](SamplerConfig).validate_python(sampler.model_dump()) == sampler
