"""p-diff's parameter autoencoder (arXiv 2402.13144, §2.2): flat parameter vectors to short latents and back.

    x --noise--> encoder --> mu --noise--> decoder --> x_hat         loss: mean squared error to the clean x

Diffusion then learns the distribution of mu, rescaled to unit deviation per dimension (`LatentScale`).

Shapes: K vectors at hand or B in a batch, P parameters of one, standardised (see `rpgcli.tokens`), Z = latent_dim,
C channels, F features that leave the convolutions.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator
from torch import Tensor, nn

from rpgcli.config import Config
from rpgcli.denoisers.conv import Norm
from rpgcli.errors import UsageError

INNER_LENGTH = 8
"""Shortest signal between encoder and decoder; shorter vectors get more padding. Instance norm turns a signal of one
sample into zeros and one of two samples into a sign."""
LIVE = 1e-6
"""Smallest deviation of a latent dimension that counts, as a fraction of the largest."""
PCA_COLUMNS = 2**16
"""Coordinates that principal components are computed from at once, which bounds the memory in float64."""


class LatentConfig(Config):
    """What every autoencoder has."""

    latent_dim: PositiveInt = 64
    """Width Z of the latent."""

    def check(self, num_parameters: int) -> None:
        """Raise a UsageError if the latent is wider than the data."""
        if self.latent_dim > num_parameters:
            raise UsageError(
                f"a latent of {self.latent_dim} dimensions is wider than the {num_parameters} parameters it encodes.",
                f"Set autoencoder.network.latent_dim to {num_parameters} or less, or generate more parameters.",
            )


class ConvShape(LatentConfig):
    """The 1-D convolutional encoder and decoder of the paper.

    Memory is linear in P: a training step on 1 M parameters, batch of 50 in parts of 5, takes 2.8 GiB in all.

    Unlike the paper, no norm follows the encoder's first convolution or precedes the decoder's last (after DCGAN):
    instance norm right behind a convolution of the vector takes away its bias and its scale, so that x and 2x got the
    same latent. On 200 checkpoints of a small MLP the error of held-out ones falls by 5 to 7 %.
    """

    channels: tuple[PositiveInt, ...] = Field(default=(8, 16, 32, 32, 8), min_length=1, strict=False)
    """Channels of the encoder's convolutions, each of which halves the length; the release: 64, 128, 256, 256, 32."""
    kernel_size: PositiveInt = 7
    """Taps of each convolution; odd."""
    norm: Norm = "instance"
    """Between the convolutions. Batch norm (the release's) mixes the vectors of a batch, so that a step in parts is not
    the step of the whole batch; p-diff's ablation ranks it behind group and instance norm."""
    input_noise: NonNegativeFloat = 1e-3
    """Deviation of the noise added to standardised parameters in training."""

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, kernel_size: int) -> int:
        if kernel_size % 2 == 0:
            raise ValueError(f"{kernel_size} must be odd, e.g. {kernel_size + 1}, so that each convolution halves")
        return kernel_size

    def lengths(self, num_parameters: int) -> tuple[int, int]:
        """Lengths of the padded vector and of the signal between encoder and decoder."""
        scale = 2 ** len(self.channels)
        inner = max(INNER_LENGTH, math.ceil(num_parameters / scale))
        return inner * scale, inner

    def norms(self) -> tuple[Norm, ...]:
        """After each of the encoder's convolutions; the decoder's in reverse."""
        return "none", *(self.norm for _ in self.channels[1:])

    def encoder(self, num_parameters: int, out_dim: int) -> nn.Sequential:
        """(B, P) -> (B, out_dim)."""
        length, inner = self.lengths(num_parameters)
        # fmt: off
        layers: list[nn.Module] = [
            nn.ConstantPad1d((0, length - num_parameters), 0.0),
            nn.Unflatten(1, (1, length)),                                                # (B, 1, padded P)
        ]
        for (c_in, c_out), norm in zip(pairwise((1, *self.channels)), self.norms()):
            conv = nn.Conv1d(c_in, c_out, self.kernel_size, stride=2, padding=self.kernel_size // 2)
            layers += [conv, norm_layer(norm, c_out), nn.LeakyReLU(inplace=True)]        # (B, C, length / 2)
        features = self.channels[-1] * inner
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, out_dim))        # (B, F) -> (B, out_dim)
        # fmt: on

    def decoder(self, num_parameters: int) -> nn.Sequential:
        """(B, Z) -> (B, P): the encoder's mirror image, and a last convolution to one channel."""
        length, inner = self.lengths(num_parameters)
        # fmt: off
        layers: list[nn.Module] = [
            nn.Linear(self.latent_dim, self.channels[-1] * inner),                       # (B, F)
            nn.Unflatten(1, (self.channels[-1], inner)),                                 # (B, C, inner)
        ]
        half, first = self.kernel_size // 2, self.channels[0]
        for (c_in, c_out), norm in zip(pairwise((*self.channels[::-1], first)), self.norms()[::-1]):
            conv = nn.ConvTranspose1d(c_in, c_out, self.kernel_size, stride=2, padding=half, output_padding=1)
            layers += [conv, norm_layer(norm, c_out), nn.ELU(inplace=True)]              # (B, C, 2 length)
        layers += [nn.Conv1d(first, 1, self.kernel_size, padding=half), nn.Flatten()]    # (B, padded P)
        return nn.Sequential(*layers, nn.ConstantPad1d((0, num_parameters - length), 0.0))    # negative padding crops
        # fmt: on


class ConvAutoencoderConfig(ConvShape):
    """The paper's autoencoder: convolutions, noise on input and latent."""

    kind: Literal["conv"] = "conv"
    latent_noise: NonNegativeFloat = 0.1
    """Deviation of the noise added to the latent in training."""

    def build(self, num_parameters: int) -> "NoisyAutoencoder":
        """Build it with freshly drawn weights; raise a UsageError if the latent is wider than the data."""
        self.check(num_parameters)
        encoder, decoder = self.encoder(num_parameters, self.latent_dim), self.decoder(num_parameters)
        return NoisyAutoencoder(encoder, decoder, self.latent_dim, self.input_noise, self.latent_noise)


class VaeConfig(ConvShape):
    """The paper's comparison: the same convolutions, with a deviation of the latent that is learned."""

    kind: Literal["vae"] = "vae"
    kl_weight: NonNegativeFloat = 1e-3
    """Weight of the divergence from N(0, 1), summed over dimensions, beside the mean squared error of a parameter."""

    def build(self, num_parameters: int) -> "Vae":
        """Build it with freshly drawn weights; raise a UsageError if the latent is wider than the data."""
        self.check(num_parameters)
        encoder, decoder = self.encoder(num_parameters, 2 * self.latent_dim), self.decoder(num_parameters)
        return Vae(encoder, decoder, self.latent_dim, self.input_noise, self.kl_weight)


class MlpAutoencoderConfig(LatentConfig):
    """The paper's comparison: fully connected, noise on input and latent."""

    kind: Literal["mlp"] = "mlp"
    widths: tuple[PositiveInt, ...] = Field(default=(256,), min_length=1, strict=False)
    """Hidden widths of the encoder; the decoder mirrors them. Weights: twice the parameters times the first."""
    input_noise: NonNegativeFloat = 1e-3
    """Deviation of the noise added to standardised parameters in training."""
    latent_noise: NonNegativeFloat = 0.1
    """Deviation of the noise added to the latent in training."""

    def build(self, num_parameters: int) -> "NoisyAutoencoder":
        """Build it with freshly drawn weights; raise a UsageError if the latent is wider than the data."""
        self.check(num_parameters)
        widths = (num_parameters, *self.widths, self.latent_dim)
        encoder, decoder = mlp(widths, nn.LeakyReLU()), mlp(widths[::-1], nn.ELU())
        return NoisyAutoencoder(encoder, decoder, self.latent_dim, self.input_noise, self.latent_noise)


class PcaConfig(LatentConfig):
    """Principal components: the best linear autoencoder, computed instead of trained."""

    kind: Literal["pca"] = "pca"

    def build(self, num_parameters: int) -> "Pca":
        """Build it with components of zero until `Pca.fit`; raise a UsageError if the latent is wider than the data."""
        self.check(num_parameters)
        return Pca(num_parameters, self.latent_dim)


AutoencoderConfig = Annotated[
    ConvAutoencoderConfig | MlpAutoencoderConfig | VaeConfig | PcaConfig, Field(discriminator="kind")
]


def norm_layer(norm: Norm, num_channels: int) -> nn.Module:
    """The norm of a (B, num_channels, length) signal."""
    norms: dict[Norm, nn.Module] = {
        "batch": nn.BatchNorm1d(num_channels),
        "group": nn.GroupNorm(math.gcd(8, num_channels), num_channels),
        "instance": nn.GroupNorm(num_channels, num_channels),
        "none": nn.Identity(),
    }
    return norms[norm]


def mlp(widths: tuple[int, ...], activation: nn.Module) -> nn.Sequential:
    """Linear maps with an activation between them: (B, widths[0]) -> (B, widths[-1])."""
    first, *rest = [nn.Linear(*pair) for pair in pairwise(widths)]
    return nn.Sequential(first, *(layer for linear in rest for layer in (activation, linear)))


# --- the autoencoders -------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module, ABC):
    """`encode` and `decode`, both without noise."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Latents mu (B, Z) of parameters (B, P)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Parameters (B, P) of latents (B, Z)."""


class NoisyAutoencoder(Autoencoder):
    """Two networks, trained to undo noise on what enters each.

    Args:
        encoder: (B, P) -> (B, Z).
        decoder: (B, Z) -> (B, P).
        latent_dim: Z.
        input_noise: Deviation of the noise on parameters.
        latent_noise: Deviation of the noise on latents.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, input_noise: float, latent_noise: float
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.latent_dim = encoder, decoder, latent_dim
        self.input_noise, self.latent_noise = input_noise, latent_noise

    def encode(self, x: Tensor) -> Tensor:
        """Latents mu (B, Z) of parameters (B, P)."""
        mu: Tensor = self.encoder(x)
        return mu

    def decode(self, z: Tensor) -> Tensor:
        """Parameters (B, P) of latents (B, Z)."""
        x_hat: Tensor = self.decoder(z)
        return x_hat

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of a noisy pass over parameters (B, P).

        A mean over vectors, each with its own noise: the losses of a batch's parts, called in order with one generator
        and weighted by their share of it, sum to the loss of the batch (but for batch norm).
        """
        return self.loss_at(x, *noise(x, self.latent_dim, generator))

    def loss_at(self, x: Tensor, eps_x: Tensor, eps_z: Tensor) -> Tensor:
        """`loss` under given noise, (B, P) and (B, Z)."""
        z = self.encode(x + self.input_noise * eps_x) + self.latent_noise * eps_z  # (B, Z)
        return (self.decode(z) - x).square().mean()


class Vae(NoisyAutoencoder):
    """Variational autoencoder (Kingma & Welling 2014): the encoder gives mean and log-variance, (B, 2Z) together."""

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, input_noise: float, kl_weight: float
    ) -> None:
        super().__init__(encoder, decoder, latent_dim, input_noise, latent_noise=1.0)
        self.kl_weight = kl_weight

    def encode(self, x: Tensor) -> Tensor:
        """Latents mu (B, Z) of parameters (B, P)."""
        return super().encode(x)[:, : self.latent_dim]

    def loss_at(self, x: Tensor, eps_x: Tensor, eps_z: Tensor) -> Tensor:
        """Mean squared error of a noisy pass over parameters (B, P), and the weighted divergence of its latents."""
        # fmt: off
        mu, log_variance = self.encoder(x + self.input_noise * eps_x).to(x).chunk(2, dim=1)       # (B, Z)
        z = mu + (log_variance / 2).exp() * eps_z                                                 # (B, Z)
        error = (self.decode(z) - x).square().mean()
        # fmt: on
        return error + self.kl_weight * kl_divergence(mu, log_variance)


class Pca(Autoencoder):
    """Scores on the leading principal components; nothing to train."""

    mean: Tensor
    components: Tensor

    def __init__(self, num_parameters: int, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_parameters))  # (P,)
        self.register_buffer("components", torch.zeros(latent_dim, num_parameters))  # (Z, P) orthonormal

    def encode(self, x: Tensor) -> Tensor:
        """Latents mu (B, Z) of parameters (B, P)."""
        return (x - self.mean) @ self.components.T

    def decode(self, z: Tensor) -> Tensor:
        """Parameters (B, P) of latents (B, Z)."""
        return z @ self.components + self.mean

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take the components from all vectors at once, (K, P), through their Gram matrix, (K, K).

        Raises:
            UsageError: If the vectors span fewer than Z directions.
        """
        gram = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
        self.mean.copy_(x.mean(0, dtype=torch.float64))
        for block in x.split(PCA_COLUMNS, dim=1):
            centred = block.double() - block.mean(0, dtype=torch.float64)
            gram += centred @ centred.T
        variance, direction = torch.linalg.eigh(gram)  # (K,) rising, (K, K)
        rank = int((variance > 1e-10 * variance[-1]).sum())  # Their roots are singular values, to five digits.
        latent_dim = len(self.components)
        if rank < latent_dim:
            raise UsageError(
                f"{len(x)} checkpoints have {rank} principal components, fewer than the latent's {latent_dim}.",
                f"Set autoencoder.network.latent_dim to {rank} or less, or collect more checkpoints.",
            )
        variance, direction = variance.flip(0)[:latent_dim], direction.flip(1)[:, :latent_dim]  # (Z,), (K, Z)
        for block, out in zip(x.split(PCA_COLUMNS, dim=1), self.components.split(PCA_COLUMNS, dim=1)):
            centred = block.double() - block.mean(0, dtype=torch.float64)
            out.copy_((direction / variance.sqrt()).T @ centred)


def noise(x: Tensor, latent_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit noise for each vector of (B, P) and its latent, (B, P) and (B, Z), drawn vector by vector."""
    widths = [x.shape[1], latent_dim]
    drawn = torch.stack([torch.randn(sum(widths), generator=generator) for _ in x]).to(x.device)  # (B, P + Z)
    eps_x, eps_z = drawn.split(widths, dim=1)
    return eps_x, eps_z


def kl_divergence(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL of N(mu, exp(log_variance)) from N(0, 1), summed over Z, mean over B (Kingma & Welling 2014, appendix B)."""
    return (mu.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2


# --- latents and report -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentScale:
    """Mean and deviation of latents; dimensions that never vary have deviation 0 and are generated as their mean."""

    mean: Tensor  # (Z,)
    std: Tensor  # (Z,)

    @classmethod
    def of(cls, mu: Tensor) -> "LatentScale":
        """Measure it on latents (K, Z)."""
        std, mean = torch.std_mean(mu.double(), dim=0, correction=0)
        return cls(mean.float(), (std * (std > LIVE * std.max())).float())

    def standardise(self, z: Tensor) -> Tensor:
        """(..., Z) to zero mean and unit deviation; dimensions that never varied become 0."""
        live = self.std > 0
        return (z - self.mean) / torch.where(live, self.std, 1.0) * live

    def restore(self, z: Tensor) -> Tensor:
        """Inverse of `standardise`, (..., Z)."""
        return z * self.std + self.mean


def reconstruction(x: Tensor, x_hat: Tensor, mean: Tensor) -> dict[str, float]:
    """How well `x_hat` repeats parameters `x`, (K, P) each.

    Returns:
        `mean_squared_error` of a parameter, and `explained_variance`: the fraction of the squared distance to `mean`,
        (P,) of the training vectors, that is not left as error. 0 is no better than the mean network, 1 is exact.
    """
    error = (x - x_hat).square().sum(dtype=torch.float64)
    total = (x - mean).square().sum(dtype=torch.float64)
    return {"mean_squared_error": float(error / x.numel()), "explained_variance": float(1 - error / total)}
