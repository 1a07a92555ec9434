from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.denoisers import DenoiserConfig
from rpgcli.denoisers.conv import ConvDenoiserConfig
from rpgcli.denoisers.mlp import MlpDenoiserConfig

KINDS: list[type[Any]] = list(get_args(get_args(DenoiserConfig)[0]))
D, M, K = 12, 8, 5


def build(config: Any, condition_dim: int = M) -> Any:
    with rng.initialising(0, "denoiser"):
        denoiser = config.build(D, condition_dim)
        for parameter in denoiser.parameters():  # wake what starts at zero
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return denoiser.eval()


def inputs(condition_dim: int = M) -> tuple[Tensor, Tensor, Tensor]:
    generator = rng.stream(0, "test")
    c = torch.randn(K, condition_dim, generator=generator)
    return torch.randn(K, D, generator=generator), torch.randint(1000, (K,), generator=generator), c


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition_dim", [M, 0])
def test_every_denoiser_keeps_its_contract(kind: type[Any], condition_dim: int) -> None:
    denoiser = build(kind(), condition_dim)
    x_t, t, c = inputs(condition_dim)
    output = denoiser(x_t, t, denoiser.embed(c))
    assert output.shape == (K, D)
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())
    assert TypeAdapter[Any](DenoiserConfig).validate_python({"kind": kind().kind}) == kind()


@pytest.mark.parametrize("kind", KINDS)
def test_every_denoiser_treats_tokens_one_by_one_and_reads_time_and_condition(kind: type[Any]) -> None:
    denoiser = build(kind())
    x_t, t, c = inputs()
    output = denoiser(x_t, t, denoiser.embed(c))
    torch.testing.assert_close(denoiser(x_t[2:3], t[2:3], denoiser.embed(c[2:3])), output[2:3], rtol=1e-5, atol=1e-5)
    assert not denoiser(x_t, t + 1, denoiser.embed(c)).equal(output)
    assert not denoiser(x_t, t, denoiser.embed(c + 1)).equal(output)


@pytest.mark.parametrize("kind", KINDS)
def test_every_denoiser_runs_under_autocast(kind: type[Any]) -> None:
    denoiser = build(kind())
    x_t, t, c = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser(x_t, t, denoiser.embed(c)).isfinite().all()


def test_the_mlp_starts_at_zero_output() -> None:
    with rng.initialising(0):
        denoiser = MlpDenoiserConfig().build(D, M)
    x_t, t, c = inputs()
    assert not denoiser(x_t, t, denoiser.embed(c)).any()


@pytest.mark.parametrize("time", ["multiply", "add"])
def test_the_conv_denoiser_is_the_papers(time: Any) -> None:
    """Against the layers written out: four encoders, two decoders, skips from the first two encoders."""
    denoiser = build(ConvDenoiserConfig(channels=(1, 4, 6, 8, 6, 4, 1), norm="none", time=time))
    x_t, t, c = inputs()
    a = denoiser.get_submodule("time")(t)[:, None]
    b = F.linear(c, denoiser.get_parameter("condition.linear.weight"), denoiser.get_parameter("condition.linear.bias"))
    convs = [module for module in denoiser.modules() if isinstance(module, nn.Conv1d)]

    def conv(i: int, x: Tensor) -> Tensor:
        x = (x + b[:, None]) * a if time == "multiply" else x + b[:, None] + a
        return F.conv1d(x, convs[i].weight, convs[i].bias, padding=3)

    x1 = F.elu(conv(0, x_t[:, None]))
    x2 = F.elu(conv(1, x1))
    x4 = F.elu(conv(3, F.elu(conv(2, x2))))
    x5 = F.elu(conv(4, x4 + x2))
    torch.testing.assert_close(denoiser(x_t, t, denoiser.embed(c)), conv(5, x5 + x1)[:, 0])


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_every_norm_of_the_conv_denoiser_stands_after_all_convolutions_but_the_last(norm: Any) -> None:
    denoiser = build(ConvDenoiserConfig(channels=(1, 4, 12, 4, 1), norm=norm))
    norms = [module for module in denoiser.modules() if isinstance(module, nn.BatchNorm1d | nn.GroupNorm)]
    assert len(norms) == (0 if norm == "none" else 3)
    x_t, t, c = inputs()
    assert denoiser.train()(x_t, t, denoiser.embed(c)).isfinite().all()


def test_only_batch_norm_mixes_the_tokens_of_a_batch_in_training() -> None:
    x_t, t, c = inputs()
    cases: list[tuple[Any, bool]] = [("batch", True), ("group", False), ("instance", False)]
    for norm, mixes in cases:
        denoiser = build(ConvDenoiserConfig(channels=(1, 4, 1), norm=norm)).train()
        full, part = denoiser(x_t, t, denoiser.embed(c))[:2], denoiser(x_t[:2], t[:2], denoiser.embed(c[:2]))
        assert torch.allclose(full, part, atol=1e-5) != mixes


def test_channels_of_the_conv_denoiser_read_from_a_list_and_must_mirror() -> None:
    assert ConvDenoiserConfig.model_validate({"channels": [1, 64, 96, 64, 1]}).channels == (1, 64, 96, 64, 1)
    for channels in ((1, 32, 64, 1), (1, 32, 32, 1), (2, 4, 2), (1,)):
        with pytest.raises(ValidationError, match="channels"):
            ConvDenoiserConfig(channels=channels)
    with pytest.raises(ValidationError, match=r"kernel_size 6 must be odd, e\.g\. 7"):
        ConvDenoiserConfig(kernel_size=6)
