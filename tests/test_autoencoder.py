"""Autoencoders: shapes, noise, exact micro-batches, and PCA, KL and the paper's shape against independent oracles."""

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from sklearn.decomposition import PCA
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.autoencoder import (
    AutoencoderConfig,
    ConvAutoencoderConfig,
    LatentScale,
    MlpAutoencoderConfig,
    NoisyAutoencoder,
    Pca,
    PcaConfig,
    Vae,
    VaeConfig,
    kl_divergence,
    noise,
    reconstruction,
)
from rpgcli.errors import UsageError
from rpgcli.training import Trainer, TrainingConfig
from tests.helpers import draw, same_bits

KINDS: list[type[Any]] = list(get_args(get_args(AutoencoderConfig)[0]))
TRAINED: list[type[Any]] = [ConvAutoencoderConfig, MlpAutoencoderConfig, VaeConfig]
NORMS: list[Any] = ["none", "batch", "group", "instance"]
Z = 4


def build(config: Any, num_parameters: int) -> Any:
    with rng.initialising(0, "autoencoder"):
        return config.build(num_parameters).eval()


def small(norm: Any = "instance", **given: Any) -> ConvAutoencoderConfig:
    return ConvAutoencoderConfig(latent_dim=Z, channels=(4, 6), kernel_size=3, norm=norm, **given)


@pytest.mark.parametrize("num_parameters", [1, 2, 10, 31, 64, 257])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_any_number_of_parameters(kind, num_parameters):
    config = kind(latent_dim=min(Z, num_parameters))
    model, x = build(config, num_parameters), draw(3, num_parameters)
    z = model.encode(x)
    assert z.shape == (3, config.latent_dim)
    assert model.decode(z).shape == x.shape
    if kind in TRAINED:
        loss = model.train().loss(x[:1], rng.stream(0))  # a batch of one trains, too
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert TypeAdapter[Any](AutoencoderConfig).validate_python(config.model_dump()) == config


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_parameters", [1, 10, 500])
def test_latents_tell_a_vector_from_its_double(norm, num_parameters):
    """Instance norm right behind the vector, or over one sample, would forget its size."""
    model = build(ConvAutoencoderConfig(latent_dim=min(16, num_parameters), norm=norm), num_parameters)
    x = draw(1, num_parameters)
    nothing, once, twice = model.encode(torch.cat([0 * x, x, 2 * x]))
    assert (twice - once).norm() > 0.02 * (once - nothing).norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_wider_than_the_data_is_refused(kind):
    with pytest.raises(UsageError, match=r"latent of 11 dimensions is wider than the 10 parameters"):
        kind(latent_dim=11).build(10)
    kind(latent_dim=10).build(10)


@pytest.mark.parametrize("kind", KINDS)
def test_building_on_the_meta_device_takes_no_memory_and_knows_the_shapes(kind):
    with torch.device("meta"):
        planned = kind().build(5000).state_dict()
    assert all(value.is_meta for value in planned.values())
    built = kind().build(5000).state_dict()
    assert {n: (v.shape, v.dtype) for n, v in planned.items()} == {n: (v.shape, v.dtype) for n, v in built.items()}


def test_the_size_of_the_convolutional_autoencoder_is_linear_in_the_parameters():
    def size(num_parameters: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in ConvAutoencoderConfig().build(num_parameters).parameters())

    one, two, three = size(320_000), size(640_000), size(960_000)
    assert three - two == two - one
    assert size(1_000_000) == pytest.approx(2 * 64 * 8 * 1_000_000 / 32, rel=0.02)  # the linear maps at the latent


def test_the_convolutional_autoencoder_written_out():
    """Against plain functions: padding, two halvings, the latent, two doublings, one channel, cropping.

    No norm beside the vectors.
    """
    model, x = build(small(), 61), draw(3, 61)
    w = {name: dict(module.named_parameters()) for name, module in model.named_modules() if name.count(".") == 1}

    def layer(name: str, norm: str | None, h: Tensor, *, up: bool) -> Tensor:
        weight, bias = w[name]["weight"], w[name]["bias"]
        if up:
            h = F.conv_transpose1d(h, weight, bias, stride=2, padding=1, output_padding=1)
        else:
            h = F.conv1d(h, weight, bias, stride=2, padding=1)
        if norm is not None:
            h = F.instance_norm(h, weight=w[norm]["weight"], bias=w[norm]["bias"])
        return F.elu(h) if up else F.leaky_relu(h)

    h = F.pad(x, (0, 3))[:, None]  # (3, 1, 64)
    h = layer("encoder.2", None, h, up=False)  # (3, 4, 32)
    h = layer("encoder.5", "encoder.6", h, up=False)  # (3, 6, 16)
    z = F.linear(h.reshape(3, 96), w["encoder.9"]["weight"], w["encoder.9"]["bias"])
    torch.testing.assert_close(model.encode(x), z)
    h = F.linear(z, w["decoder.0"]["weight"], w["decoder.0"]["bias"]).reshape(3, 6, 16)
    h = layer("decoder.2", "decoder.3", h, up=True)  # (3, 4, 32)
    h = layer("decoder.5", None, h, up=True)  # (3, 4, 64)
    h = F.conv1d(h, w["decoder.8"]["weight"], w["decoder.8"]["bias"], padding=1)  # (3, 1, 64)
    torch.testing.assert_close(model.decode(z), h[:, 0, :61])


@pytest.mark.parametrize("config", [*[small(norm) for norm in NORMS], *[kind(latent_dim=Z) for kind in KINDS[1:]]])
def test_encoding_and_decoding_are_deterministic_and_treat_vectors_one_by_one(config):
    model, x = build(config, 50), draw(6, 50)
    if isinstance(model, Pca):
        model.fit(x)
    z = model.encode(x)
    assert torch.equal(model.encode(x), z)
    torch.testing.assert_close(model.encode(x[2:3]), z[2:3])
    torch.testing.assert_close(model.decode(z[2:3]), model.decode(z)[2:3])


def test_only_batch_norm_mixes_the_vectors_of_a_batch_in_training():
    x = draw(6, 50)
    for norm in NORMS:
        model = build(small(norm), 50).train()
        assert torch.allclose(model.encode(x)[:2], model.encode(x[:2]), atol=1e-5) == (norm != "batch")


def test_even_kernels_are_refused():
    with pytest.raises(ValidationError, match=r"6 must be odd, e\.g\. 7"):
        ConvAutoencoderConfig(kernel_size=6)


# --- the loss ---------------------------------------------------------------------------------------------------------


class Seen(NoisyAutoencoder):
    """Copies vectors and keeps what it saw."""

    def __init__(self, width: int, input_noise: float, latent_noise: float) -> None:
        super().__init__(nn.Identity(), nn.Identity(), width, input_noise, latent_noise)
        self.inputs: list[Tensor] = []

    def encode(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return x

    def decode(self, z: Tensor) -> Tensor:
        self.inputs.append(z)
        return z


def test_noise_enters_where_and_as_strongly_as_asked():
    x, model = draw(40, 5000), Seen(5000, 0.03, 0.4)
    loss = model.loss(x, rng.stream(0))
    into_encoder, into_decoder = model.inputs
    on_input, on_latent = into_encoder - x, into_decoder - into_encoder
    assert float(on_input.std()) == pytest.approx(0.03, rel=0.01)  # 200,000 draws: 0.2 % is one deviation
    assert float(on_latent.std()) == pytest.approx(0.4, rel=0.01)
    for mean, deviation in ((on_input.mean(), 0.03), (on_latent.mean(), 0.4)):
        assert abs(float(mean)) < 5 * deviation / math.sqrt(x.numel())
    assert abs(float((on_input * on_latent).mean())) < 5 * 0.03 * 0.4 / math.sqrt(x.numel())  # independent
    torch.testing.assert_close(loss, (into_decoder - x).square().mean())  # against the clean vectors


@pytest.mark.parametrize("kind", TRAINED)
def test_the_loss_depends_on_its_generator_alone(kind):
    model, x = build(kind(latent_dim=Z), 50), draw(6, 50)
    assert torch.equal(model.loss(x, rng.stream(0)), model.loss(x, rng.stream(0)))
    assert not torch.equal(model.loss(x, rng.stream(0)), model.loss(x, rng.stream(1)))


@pytest.mark.parametrize("width", [3, 50])
def test_the_noise_of_a_batch_in_parts_is_that_of_the_batch(width):
    x, generator = draw(7, width), rng.stream(0)
    parts = [noise(part, Z, generator) for part in x.split(3)]
    for whole, pieces in zip(noise(x, Z, rng.stream(0)), zip(*parts)):
        assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize(
    "config", [small("none"), small("group"), small(), VaeConfig(latent_dim=Z, channels=(4, 6)), MlpAutoencoderConfig()]
)
def test_micro_batches_give_the_step_of_the_whole_batch(config):
    x = draw(7, 100).double()

    def trained(part_size: int) -> tuple[float, dict[str, Tensor], dict[str, Tensor | None]]:
        model = build(config, 100).train().double()
        trainer = Trainer(model, TrainingConfig(ema_decay=0.0))
        generator = rng.stream(0)
        trainer.advance(model.loss(part, generator) * len(part) / len(x) for part in x.split(part_size))
        return float(trainer.window), model.state_dict(), {n: p.grad for n, p in model.named_parameters()}

    whole = trained(7)
    assert all(gradient is not None and gradient.any() for gradient in whole[2].values())
    torch.testing.assert_close(trained(3), whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trained(1), whole, rtol=1e-9, atol=1e-12)


def test_the_divergence_is_the_one_torch_knows():
    mu, log_variance = draw(5, Z), draw(5, Z, seed=1)
    posterior = torch.distributions.Normal(mu, (log_variance / 2).exp())
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
    torch.testing.assert_close(kl_divergence(mu, log_variance), expected)
    assert float(kl_divergence(torch.zeros(5, Z), torch.zeros(5, Z))) == 0


def test_the_vae_samples_its_own_posterior():
    """Its two networks replaced by ones whose latent is known."""
    mean, deviation = 2.0, 0.5

    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.full_like(x, mean), torch.full_like(x, 2 * math.log(deviation))], dim=1)

    model = Vae(Encoder(), nn.Identity(), 1000, input_noise=0.0, kl_weight=0.25)
    x = torch.full((100, 1000), mean)
    assert torch.equal(model.encode(x), x)
    divergence = 1000 * (mean**2 + deviation**2 - 1 - 2 * math.log(deviation)) / 2
    error = float(model.loss(x, rng.stream(0))) - 0.25 * divergence
    assert error == pytest.approx(deviation**2, rel=0.03)  # 100,000 draws, beside a divergence of 2318


@pytest.mark.parametrize("kind", TRAINED)
def test_the_loss_runs_under_autocast(kind):
    model, x = build(kind(latent_dim=Z), 50), draw(6, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(x, rng.stream(0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss(x, rng.stream(0)), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        ConvAutoencoderConfig(latent_dim=8, channels=(8, 8, 8)),
        VaeConfig(latent_dim=8, channels=(8, 8, 8)),
        MlpAutoencoderConfig(latent_dim=8),
    ],
)
def test_training_finds_the_directions_in_which_vectors_differ(config):
    """Held-out vectors of a two-dimensional family are explained far better than by their mean."""
    place = torch.linspace(0, 6, 60)
    x = draw(120, 2) @ torch.stack([place.sin(), (2 * place).cos()])  # (K, P)
    model = build(config, 60).train()
    trainer = Trainer(model, TrainingConfig(num_steps=150, learning_rate=1e-2, ema_decay=0.0))
    for step in range(150):
        batch = torch.randint(100, (20,), generator=rng.stream(0, "batch", step))
        trainer.advance(model.loss(x[batch], rng.stream(0, "noise", step)))
    with torch.no_grad():
        x_hat = model.eval().decode(model.encode(x[100:]))
    assert reconstruction(x[100:], x_hat, x[:100].mean(0))["explained_variance"] > 0.5


# --- principal components ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_vectors", "num_parameters"), [(30, 50), (200, 12), (9, 70_000)])
def test_pca_is_scikit_learn_s(num_vectors, num_parameters):
    spread = torch.linspace(3, 0.1, num_parameters)
    x, other = draw(num_vectors, num_parameters) * spread + 5, draw(4, num_parameters) * spread + 5
    model = build(PcaConfig(latent_dim=Z), num_parameters)
    model.fit(x)
    oracle = PCA(Z, svd_solver="full").fit(x.double().numpy())
    expected = oracle.inverse_transform(oracle.transform(other.double().numpy()))
    found = model.decode(model.encode(other))
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.components @ model.components.T, torch.eye(Z), rtol=0, atol=1e-5)
    variance = model.encode(x).var(0).double()
    torch.testing.assert_close(variance, torch.from_numpy(oracle.explained_variance_), rtol=1e-4, atol=0)


def test_pca_of_too_few_checkpoints_is_refused():
    model = PcaConfig(latent_dim=5).build(50)
    with pytest.raises(UsageError, match=r"5 checkpoints have 4 principal components, fewer than the latent's 5"):
        model.fit(draw(5, 50))
    with pytest.raises(UsageError, match=r"8 checkpoints have 1 principal components"):
        model.fit(draw(8, 1) * draw(50))
    PcaConfig(latent_dim=4).build(50).fit(draw(5, 50))


@pytest.mark.parametrize("config", [*[small(norm) for norm in NORMS], *[kind(latent_dim=Z) for kind in KINDS[1:]]])
def test_a_state_dict_is_all_there_is(config):
    model, x = build(config, 50), draw(8, 50)
    if isinstance(model, Pca):
        model.fit(x)
    else:
        Trainer(model.train(), TrainingConfig(ema_decay=0.0)).advance(model.loss(x, rng.stream(0)))  # statistics, too
    again = config.build(50)
    again.load_state_dict(model.state_dict())
    assert same_bits(again.state_dict(), model.state_dict())
    z = model.eval().encode(x)
    assert torch.equal(again.eval().encode(x), z)
    assert torch.equal(again.decode(z), model.decode(z))


# --- latents and report -----------------------------------------------------------------------------------------------


def test_latents_are_rescaled_to_unit_deviation_and_back():
    mu = draw(500, Z) * torch.tensor([1e-3, 1.0, 40.0, 3.0]) + torch.tensor([0.0, -2.0, 100.0, 5.0])
    scale = LatentScale.of(mu)
    z = scale.standardise(mu)
    torch.testing.assert_close(z.mean(0), torch.zeros(Z), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(Z), rtol=1e-5, atol=0)
    torch.testing.assert_close(scale.restore(z), mu, rtol=1e-5, atol=1e-6)


def test_a_dead_latent_dimension_is_generated_as_its_mean():
    mu = draw(50, Z)
    mu[:, 1] = 7.0
    mu[:, 2] *= 1e-8
    scale = LatentScale.of(mu)
    assert not scale.standardise(mu)[:, 1:3].any()
    restored = scale.restore(draw(5, Z, seed=1))
    assert torch.equal(restored[:, 1:3], torch.stack([mu[0, 1], mu[:, 2].double().mean().float()]).expand(5, 2))
    assert restored[:, [0, 3]].std(0).min() > 0.1
    assert not LatentScale.of(torch.ones(5, Z)).std.any()  # a collapsed autoencoder


def test_reconstruction_counts_what_the_mean_leaves_open():
    mean = draw(50, seed=2)
    x = mean + draw(20, 50)
    assert reconstruction(x, x, mean) == {"mean_squared_error": 0.0, "explained_variance": 1.0}
    assert reconstruction(x, mean.expand_as(x), mean)["explained_variance"] == 0.0
    halfway = reconstruction(x, (x + mean) / 2, mean)
    assert halfway["explained_variance"] == pytest.approx(0.75, rel=1e-6)
    assert halfway["mean_squared_error"] == pytest.approx(float((x - mean).square().mean()) / 4, rel=1e-6)
    assert reconstruction(x, 2 * mean - x, mean)["explained_variance"] == pytest.approx(-3, rel=1e-5)
