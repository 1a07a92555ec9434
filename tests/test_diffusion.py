import math
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rpgcli import rng
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.diffusion import Diffusion, DiffusionConfig, Target
from rpgcli.targets.torchvision_shim import import_torchvision

TARGETS = get_args(Target)
SCHEDULES = ["linear", "cosine"]


def draw(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(shape, generator=rng.stream(0, "test", name))


class Linear:
    """A denoiser that works slot by slot, so that the number of slots does not change what it does."""

    def embed(self, c: Tensor) -> Tensor:
        return c.sum(dim=1, keepdim=True)

    def __call__(self, x_t: Tensor, t: Tensor, e: Tensor) -> Tensor:
        return 0.7 * x_t + 0.1 * e + t[:, None] / 1000


class Perfect(Linear):
    """Knows the clean token and the noise, hence every target."""

    def __init__(self, diffusion: Diffusion, x_0: Tensor, eps: Tensor) -> None:
        self.diffusion, self.x_0, self.eps = diffusion, x_0, eps

    def __call__(self, x_t: Tensor, t: Tensor, e: Tensor) -> Tensor:
        return self.diffusion.output_target(self.x_0, self.eps, t)


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 10, 30, 100, 1000, 2000])
def test_every_number_of_steps_falls_from_clean_to_noise(schedule: Any, num_steps: int) -> None:
    alpha_bar = DiffusionConfig(num_steps=num_steps, schedule=schedule).alpha_bar()
    assert alpha_bar.dtype == torch.float64
    assert len(alpha_bar) == num_steps
    assert (alpha_bar.diff() < 0).all()
    assert 1e-6 < alpha_bar[-1] < 1e-3
    assert alpha_bar[0] < 1


def test_the_rescaled_schedule_of_1000_steps_is_the_raw_one() -> None:
    rescaled, raw = (DiffusionConfig(rescale=rescale).alpha_bar() for rescale in (True, False))
    torch.testing.assert_close(rescaled, raw, rtol=1e-12, atol=0)
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(raw, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("num_steps", "stride"), [(500, 2), (100, 10), (10, 100)])
def test_fewer_rescaled_steps_are_points_of_the_same_curve(num_steps: int, stride: int) -> None:
    full = DiffusionConfig().alpha_bar()
    torch.testing.assert_close(DiffusionConfig(num_steps=num_steps).alpha_bar(), full[stride - 1 :: stride])


def test_raw_betas_of_100_steps_stop_far_from_noise() -> None:
    assert DiffusionConfig(num_steps=100, rescale=False).alpha_bar()[-1].item() == pytest.approx(0.36, abs=0.01)


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
def test_schedules_agree_with_diffusers(num_steps: int) -> None:
    import_torchvision()
    from diffusers import DDPMScheduler

    oracle: Any = DDPMScheduler
    linear = oracle(num_steps, beta_start=1e-4, beta_end=0.02).alphas_cumprod
    ours = DiffusionConfig(num_steps=num_steps, rescale=False).alpha_bar()
    torch.testing.assert_close(ours.float(), linear, rtol=1e-4, atol=0)  # theirs is a float32 product
    cosine = oracle(num_steps, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    ours = DiffusionConfig(num_steps=num_steps, schedule="cosine").alpha_bar()
    torch.testing.assert_close(ours.float(), cosine, rtol=0, atol=5e-3)  # ours stops 0.4 % before the cosine's zero


def test_a_schedule_that_loses_the_signal_is_refused() -> None:
    assert DiffusionConfig(num_steps=2000, rescale=False).alpha_bar()[-1] < 1e-8  # p-diff's ablation
    with pytest.raises(ValidationError, match="lower beta_end"):
        DiffusionConfig(beta_end=0.9)


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_predict_inverts_output_target_at_every_step(target: Target, schedule: Any) -> None:
    diffusion = DiffusionConfig(target=target, schedule=schedule, num_steps=100).build()
    t = torch.arange(100)
    x_0, eps = draw(100, 6, name="x_0"), draw(100, 6, name="eps")
    x_t = diffusion.q_sample(x_0, t, eps)
    got_x_0, got_eps = diffusion.predict(diffusion.output_target(x_0, eps, t), x_t, t)
    # Where one rate is 0.006, the other quantity carries float32's 1e-7 divided by it.
    torch.testing.assert_close(got_x_0, x_0, rtol=0, atol=1e-4)
    torch.testing.assert_close(got_eps, eps, rtol=0, atol=1e-4)


def test_all_targets_say_the_same() -> None:
    t, x_t, x_0 = torch.tensor([0, 300, 700, 999]), draw(4, 6, name="x_t"), draw(4, 6, name="x_0")
    diffusions = {target: DiffusionConfig(target=target).build() for target in TARGETS}
    _, eps = diffusions["x0"].predict(x_0, x_t, t)
    v = diffusions["v"].output_target(x_0, eps, t)
    torch.testing.assert_close(diffusions["v"].predict(v, x_t, t), (x_0, eps), rtol=1e-4, atol=1e-4)
    for target, output in (("eps", eps), ("v", v), ("x0", x_0)):
        got_x_0, got_eps = diffusions[target].predict(output, x_t, t)
        torch.testing.assert_close(diffusions["eps"].q_sample(got_x_0, t, got_eps), x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [100, 2000])
def test_eps_prediction_survives_the_noisiest_steps_there_are(num_steps: int) -> None:
    """x_0 is ill-determined there, but what a sampler makes of the pair is not."""
    diffusion = DiffusionConfig(target="eps", num_steps=num_steps, rescale=num_steps == 100).build()
    t, x_t, output = torch.tensor([num_steps - 1]), draw(1, 6, name="x_t"), draw(1, 6, name="eps")
    x_0, eps = diffusion.predict(output, x_t, t)
    now, before = diffusion.alpha_bar[-1].item(), diffusion.alpha_bar[-2].item()
    scaled = math.sqrt(before / now)
    exact = scaled * x_t + (math.sqrt(1 - before) - scaled * math.sqrt(1 - now)) * output
    torch.testing.assert_close(diffusion.q_sample(x_0, t - 1, eps), exact, rtol=1e-5, atol=1e-5)


def test_q_sample_keeps_unit_variance_and_the_state_dict_stays_empty() -> None:
    diffusion = DiffusionConfig().build()
    signal, noise = diffusion.rates(torch.arange(1000))
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones(1000, 1))
    assert diffusion.state_dict() == {}


# ------------------------------------------------------------------ loss


def loss_inputs(k: int = 6, d: int = 5) -> dict[str, Tensor]:
    mask = torch.ones(k, d, dtype=torch.bool)
    mask[1, 3:] = mask[4, 1:] = False
    t = torch.tensor([0, 10, 300, 555, 900, 999])
    return {
        "x_0": draw(k, d, name="x_0"),
        "c": draw(k, 3, name="c"),
        "mask": mask,
        "t": t,
        "eps": draw(k, d, name="eps"),
    }


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_the_mean_over_slots_that_hold_parameters(target: Target) -> None:
    diffusion, given = DiffusionConfig(target=target).build(), loss_inputs()
    total, count = 0.0, 0
    for k, d in given["mask"].nonzero().tolist():
        s, n = (rate[k].item() for rate in diffusion.rates(given["t"]))
        x_0, eps, t = given["x_0"][k, d].item(), given["eps"][k, d].item(), given["t"][k].item()
        wanted = {"eps": eps, "x0": x_0, "v": s * eps - n * x_0}[target]
        total += (0.7 * (s * x_0 + n * eps) + 0.1 * given["c"][k].sum().item() + t / 1000 - wanted) ** 2
        count += 1
    assert diffusion.loss_at(Linear(), **given).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("rubbish", [0.0, 1e6, math.inf, math.nan])
@pytest.mark.parametrize("target", TARGETS)
def test_padding_does_not_change_the_loss_or_its_gradient(target: Target, rubbish: float) -> None:
    diffusion, given = DiffusionConfig(target=target).build(), loss_inputs()
    expected = diffusion.loss_at(Linear(), **given)
    with rng.initialising(0):
        denoiser = MlpDenoiserConfig(width=16, depth=1).build(5, 3)
        torch.nn.init.normal_(denoiser.output.weight)
    gradients = []
    for padded in (given["x_0"], given["x_0"].masked_fill(~given["mask"], rubbish)):
        given["x_0"] = padded
        assert diffusion.loss_at(Linear(), **given).equal(expected)
        loss = diffusion.loss_at(denoiser, **given)
        gradients.append(torch.autograd.grad(loss, list(denoiser.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("extra", [1, 7])
def test_the_amount_of_padding_does_not_change_the_loss(extra: int) -> None:
    diffusion, given = DiffusionConfig().build(), loss_inputs()
    expected = diffusion.loss_at(Linear(), **given)
    wider = given | {name: torch.nn.functional.pad(given[name], (0, extra)) for name in ("x_0", "eps", "mask")}
    torch.testing.assert_close(diffusion.loss_at(Linear(), **wider), expected)
    longer = {name: torch.cat([value, value.new_zeros(extra, *value.shape[1:])]) for name, value in given.items()}
    torch.testing.assert_close(diffusion.loss_at(Linear(), **longer), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_a_denoiser_that_knows_the_answer_has_no_loss(target: Target) -> None:
    diffusion, given = DiffusionConfig(target=target).build(), loss_inputs()
    denoiser = Perfect(diffusion, given["x_0"], given["eps"])
    assert diffusion.loss_at(denoiser, **given).item() == 0


def test_the_loss_is_a_function_of_its_generator_and_draws_a_step_per_token() -> None:
    diffusion = DiffusionConfig(num_steps=50).build()
    seen: list[Tensor] = []

    class Spy(Linear):
        def __call__(self, x_t: Tensor, t: Tensor, e: Tensor) -> Tensor:
            seen.append(t)
            return super().__call__(x_t, t, e)

    many = {"x_0": draw(4000, 5), "c": draw(4000, 3), "mask": torch.ones(4000, 5, dtype=torch.bool)}
    losses = [diffusion.loss(Spy(), **many, generator=rng.stream(seed)).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert seen[0].dtype == torch.int64
    # uniform on 0 .. 49: 80 expected each, six standard deviations allowed
    assert (seen[0].bincount(minlength=50) - 80).abs().max() < 6 * 80**0.5
    assert len(seen[0].bincount()) == 50
