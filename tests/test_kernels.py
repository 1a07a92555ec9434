import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpgcli import kernels, rng
from rpgcli.errors import UsageError
from rpgcli.kernels import causal_conv, chunked_scan, gated_rms_norm, resolve_backend, scan_on, scan_reference

CPU = torch.device("cpu")


def scan_inputs(
    batch: int = 2, length: int = 11, heads: int = 4, headdim: int = 3, groups: int = 2, d_state: int = 5,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:  # fmt: skip
    generator = rng.stream(0, "test", batch, length, heads, headdim, groups, d_state)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    x, dt = draw(batch, length, heads, headdim), F.softplus(draw(batch, length, heads) - 2)
    A, D = -torch.empty(heads, dtype=dtype).uniform_(1, 16, generator=generator), draw(heads)
    return [x, dt, A, draw(batch, length, groups, d_state), draw(batch, length, groups, d_state), D]


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40), chunk_size=st.integers(1, 48), groups=st.sampled_from([1, 2, 4]), batch=st.integers(1, 3)
)
def test_chunked_scan_is_the_recurrence_whatever_the_chunks(
    length: int, chunk_size: int, groups: int, batch: int
) -> None:
    inputs = scan_inputs(batch, length, groups=groups)
    torch.testing.assert_close(
        chunked_scan(*inputs, chunk_size=chunk_size), scan_reference(*inputs), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("split", [1, 4, 7, 19])
def test_a_sequence_cut_anywhere_goes_on_from_its_state(split: int, groups: int) -> None:
    x, dt, A, B, C, D = scan_inputs(length=20, groups=groups)
    state = torch.zeros(2, 4, 3, 5, dtype=x.dtype)  # (B, H, P, N)
    parts = []
    for here in (slice(0, split), slice(split, 20)):
        y, state = scan_on(x[:, here], dt[:, here], A, B[:, here], C[:, here], D, state, chunk_size=4)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), scan_reference(x, dt, A, B, C, D), rtol=1e-11, atol=1e-11)
    # What is left behind: one more position reads C^T S.
    one = torch.zeros(2, 1, 4, 3, dtype=x.dtype)
    read, _ = scan_on(one, dt[:, :1] * 0, A, B[:, :1], C[:, :1], D, state)
    expected = (C[:, 0].repeat_interleave(4 // groups, 1)[:, :, None] * state).sum(-1)
    torch.testing.assert_close(read[:, 0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [46, 64, 300])
def test_chunked_scan_in_float32_keeps_five_digits(length: int) -> None:
    inputs = scan_inputs(length=length, headdim=16, d_state=32, dtype=torch.float32)
    exact = scan_reference(*(value.double() for value in inputs))
    # Differences of summed log-decays lose a digit and a half against float32's seven; outputs are of order 1 to 10.
    torch.testing.assert_close(chunked_scan(*inputs).double(), exact, rtol=3e-5, atol=3e-5)


def test_chunked_scan_has_the_gradients_of_the_recurrence() -> None:
    inputs = [value.requires_grad_() for value in scan_inputs(length=11)]
    weight = torch.randn(2, 11, 4, 3, dtype=torch.float64, generator=rng.stream(1))
    chunked = torch.autograd.grad(chunked_scan(*inputs, chunk_size=4), inputs, weight)
    sequential = torch.autograd.grad(scan_reference(*inputs), inputs, weight)
    for ours, expected in zip(chunked, sequential, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_chunked_scan_passes_gradcheck() -> None:
    inputs = [value.requires_grad_() for value in scan_inputs(1, 5, 2, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda *values: chunked_scan(*values, chunk_size=2), inputs)


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_chunked_scan_does_not_look_ahead(chunk_size: int) -> None:
    x, dt, A, B, C, D = scan_inputs(length=12)
    y = chunked_scan(x, dt, A, B, C, D, chunk_size=chunk_size)
    for value in (x, dt, B, C):
        value[:, 7:] = 9.0
    changed = chunked_scan(x, dt, A, B, C, D, chunk_size=chunk_size)
    torch.testing.assert_close(changed[:, :7], y[:, :7], rtol=0, atol=0)
    assert not changed[:, 7:].isclose(y[:, 7:]).any()


def test_strong_decay_over_a_long_sequence_stays_finite_in_value_and_gradient() -> None:
    x, _, _, B, C, D = scan_inputs(1, 500, dtype=torch.float32)
    dt, A = torch.full((1, 500, 4), 20.0), torch.full((4,), -16.0)  # log-decays sum to -160,000
    inputs = [value.requires_grad_() for value in (x, dt, A, B, C, D)]
    y = chunked_scan(*inputs)
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), inputs))


def test_the_scan_stays_float32_under_autocast() -> None:
    inputs = scan_inputs(dtype=torch.float32)
    expected = chunked_scan(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chunked_scan(*inputs).equal(expected)
        x, dt, A, B, C, D = inputs
        assert chunked_scan(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D).dtype == torch.float32


@pytest.mark.parametrize(("length", "num_taps"), [(1, 4), (3, 4), (20, 4), (20, 1), (20, 7)])
def test_causal_conv_is_torchs_depthwise_convolution(length: int, num_taps: int) -> None:
    generator = rng.stream(2, num_taps)
    x = torch.randn(2, length, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, num_taps, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = F.silu(F.conv1d(x.mT, weight, bias, padding=num_taps - 1, groups=6)[..., :length].mT)
    actual = causal_conv(x, weight, bias)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (actual, expected))
    torch.testing.assert_close(*gradients)


def test_gated_rms_norm_normalises_each_group_by_itself() -> None:
    y, z, weight = (torch.randn(2, 3, 8, generator=rng.stream(3, name)).double() for name in "yzw")
    gated = y * z * torch.sigmoid(z)
    for num_groups in (1, 2):
        size = 8 // num_groups
        parts = [gated[..., i : i + size] for i in range(0, 8, size)]
        expected = torch.cat([part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in parts], -1)
        torch.testing.assert_close(gated_rms_norm(y, z, weight[0, 0], 1e-5, num_groups), expected * weight[0, 0])


# ------------------------------------------------------------------ backends


def test_without_a_gpu_auto_means_torch_and_cuda_is_refused_with_what_to_install() -> None:
    assert resolve_backend("auto", CPU) == resolve_backend("torch", CPU) == "torch"
    available, reason = kernels.kernels_available(CPU)
    assert not available
    assert "CUDA device" in reason
    with pytest.raises(UsageError, match=r"pip install --no-build-isolation 'rpgcli\[cuda\]'"):
        resolve_backend("cuda", CPU)


def test_a_missing_package_is_named_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", None)
    kernels._import_error.cache_clear()
    kernels._warn_once.cache_clear()
    for _ in range(2):
        assert resolve_backend("auto", torch.device("cuda")) == "torch"
    kernels._import_error.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "mamba_ssm" in caplog.text


class FakeKernels:
    """Stands in for both packages with their documented signatures, computing with the twins, and counts calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None
    ) -> Tensor:
        assert D is not None
        self.calls.append("scan")
        return scan_reference(x, dt, A, B, C, D)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
        assert activation == "silu"
        self.calls.append("conv")
        padded = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        return F.silu(padded[..., : x.shape[-1]])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernels]:
    fake = FakeKernels()
    members: dict[str, dict[str, Any]] = {
        "mamba_ssm": {}, "mamba_ssm.ops": {}, "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": fake.scan},
        "causal_conv1d": {"causal_conv1d_fn": fake.conv},
    }  # fmt: skip
    for name, attributes in members.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    kernels._import_error.cache_clear()
    monkeypatch.setattr(kernels, "version", lambda package: "9.9")
    yield fake
    kernels._import_error.cache_clear()


def test_the_cuda_path_calls_both_kernels_and_agrees_with_the_twins(fake: FakeKernels) -> None:
    inputs = scan_inputs(dtype=torch.float32)
    torch.testing.assert_close(chunked_scan(*inputs, backend="cuda"), chunked_scan(*inputs))
    x, weight, bias = torch.randn(2, 9, 16), torch.randn(16, 1, 4), torch.randn(16)
    torch.testing.assert_close(causal_conv(x, weight, bias, backend="cuda"), causal_conv(x, weight, bias))
    assert fake.calls == ["scan", "conv"]
    assert kernels.kernels_available(torch.device("cuda")) == (True, "mamba-ssm 9.9, causal-conv1d 9.9")


def test_sizes_that_the_convolution_kernel_lacks_use_the_twin(fake: FakeKernels) -> None:
    for channels, num_taps in ((16, 5), (12, 4)):
        causal_conv(
            torch.randn(2, 9, channels), torch.randn(channels, 1, num_taps), torch.randn(channels), backend="cuda"
        )
    assert fake.calls == []


def test_a_missing_causal_conv1d_leaves_the_scan_kernel_usable(
    fake: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    available, versions = kernels.kernels_available(torch.device("cuda"))
    assert available
    assert "causal-conv1d missing" in versions
    causal_conv(torch.randn(2, 9, 16), torch.randn(16, 1, 4), torch.randn(16), backend="cuda")
    assert fake.calls == []


def test_compare_backends_measures_values_and_gradients(fake: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels_available", lambda device: (True, ""))
    assert kernels.compare_backends(CPU) < 1e-5  # the reference against the chunked twin, both float32


@pytest.mark.gpu
def test_kernels_agree_with_their_twins_on_a_gpu() -> None:
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    available, reason = kernels.kernels_available(device)
    if not available:
        pytest.skip(reason)
    # Triton multiplies float32 matrices in TF32 (10 bits of mantissa) unless told otherwise.
    assert kernels.compare_backends(device) < 5e-3
    inputs = [
        value.to(device) for value in scan_inputs(length=600, heads=4, headdim=32, d_state=16, dtype=torch.float32)
    ]
    x, dt, A, B, C, D = inputs
    state, parts = torch.zeros(2, 4, 32, 16, device=device), []
    for here in (slice(0, 512), slice(512, 600)):
        y, state = scan_on(x[:, here], dt[:, here], A, B[:, here], C[:, here], D, state, backend="cuda")
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), chunked_scan(*inputs), rtol=5e-3, atol=5e-3)
