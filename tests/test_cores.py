from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rpgcli import kernels, rng
from rpgcli.config import Config
from rpgcli.cores import CoreConfig, mamba2
from rpgcli.cores.lstm import LstmConfig
from rpgcli.cores.mamba2 import Mamba2Block, Mamba2Config, initial_dt_bias
from rpgcli.cores.transformer import TransformerConfig
from rpgcli.targets.torchvision_shim import import_torchvision

KINDS: list[type[Any]] = list(get_args(get_args(CoreConfig)[0]))
CAUSAL = [Mamba2Config(d_model=32, headdim=8), LstmConfig(d_model=32)]


def build(config: Any, seed: int = 0) -> Any:
    with rng.initialising(seed, "core"):
        return config.build()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=rng.stream(0, "test", *shape))


# ------------------------------------------------------------------ every core


@pytest.mark.parametrize("kind", KINDS)
def test_every_core_keeps_its_contract(kind: type[Any]) -> None:
    core, config = build(kind()), kind()
    h = draw(2, 7, config.d_model).requires_grad_()
    prototypes = core(h)
    assert core.d_model == config.d_model
    assert prototypes.shape == (2, 7, core.out_dim)
    prototypes.square().sum().backward()
    assert all(parameter.grad is not None for parameter in core.parameters())
    torch.testing.assert_close(core(h)[:1], core(h[:1]))  # sequences of a batch do not meet
    assert TypeAdapter[Any](CoreConfig).validate_python({"kind": config.kind}) == config


@pytest.mark.parametrize("kind", KINDS)
def test_every_core_is_built_from_its_seed_alone(kind: type[Any]) -> None:
    first, again, other = (build(kind(), seed).state_dict() for seed in (0, 0, 1))
    assert all(first[name].equal(again[name]) for name in first)
    assert not first or any(not first[name].equal(other[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_every_core_runs_under_autocast(kind: type[Any]) -> None:
    core, h = build(kind()), draw(2, 7, kind().d_model)
    expected = core(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # bfloat16 keeps 8 bits, and two layers add their errors
        torch.testing.assert_close(core(h).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("config", CAUSAL, ids=lambda config: str(config.kind))
def test_recurrent_cores_do_not_look_ahead(config: Config) -> None:
    core, h = build(config), draw(2, 80, 32)
    prototypes = core(h)
    changed = core(torch.cat([h[:, :70], draw(2, 10, 32)], dim=1))
    torch.testing.assert_close(changed[:, :70], prototypes[:, :70], rtol=1e-5, atol=1e-5)
    assert not changed[:, 70:].isclose(prototypes[:, 70:]).any()


def test_the_first_prototype_reaches_the_last() -> None:
    for config in [*CAUSAL, TransformerConfig(d_model=32)]:
        core, h = build(config), draw(1, 30, 32).requires_grad_()
        (gradient,) = torch.autograd.grad(core(h)[0, -1].sum(), h)
        assert gradient[0, 0].abs().max() > 0


# ------------------------------------------------------------------ memory


def kept_bytes(core: Any, h: Tensor) -> int:
    """What autograd keeps of a forward pass, the core's own parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in core.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        core(h)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [*CAUSAL, TransformerConfig(d_model=32)], ids=lambda config: str(config.kind))
def test_recomputed_blocks_give_the_same_bits_and_keep_only_what_enters_them(config: Any, dtype: torch.dtype) -> None:
    plain, again = build(config), build(config.model_copy(update={"recompute": True}))
    h = draw(2, 70, 32)
    results = []
    for core in (plain, again):
        entered = h.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            prototypes = core(entered)
        prototypes.float().square().sum().backward()
        results.append([prototypes.detach(), entered.grad, *(p.grad for p in core.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    entered = h.clone().requires_grad_()
    assert kept_bytes(again, entered) <= 4 * h.numel() * len(again.blocks)
    assert kept_bytes(plain, entered) > 4 * kept_bytes(again, entered)
    with torch.no_grad():
        assert torch.equal(again(h), plain(h))


@pytest.mark.parametrize("part", [64, 100, 299])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_a_long_sequence_read_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch, part: int, ngroups: int) -> None:
    core, h = build(Mamba2Config(d_model=32, headdim=8, d_state=8, ngroups=ngroups)), draw(2, 300, 32)
    whole = core(h).detach()
    monkeypatch.setattr(mamba2, "PART", part)
    monkeypatch.setattr(mamba2, "WIDE", 64)  # the inner width
    with torch.no_grad():
        in_parts = core(h)
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-5)
    if part == kernels.TORCH_CHUNK_SIZE:
        assert torch.equal(in_parts, whole)
    torch.testing.assert_close(core(h), whole, rtol=0, atol=0)  # With gradients it is not cut.


def test_the_scan_and_its_parameters_stay_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    core, seen = build(Mamba2Config(d_model=32, headdim=8)), list[torch.dtype]()
    scan = kernels._chunked_scan

    def spy(*values: Any) -> tuple[Tensor, Tensor | None]:
        seen.extend(value.dtype for value in values[:5])
        return scan(*values)

    monkeypatch.setattr(kernels, "_chunked_scan", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        core(draw(2, 7, 32)).float().sum().backward()
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in core.parameters()} == {p.grad.dtype for p in core.parameters()} == {torch.float32}


# ------------------------------------------------------------------ transformer


def test_attention_is_a_softmax_over_scaled_products() -> None:
    core = build(TransformerConfig(d_model=16, num_layers=1, num_heads=2))
    attention, h = core.get_submodule("blocks.0"), draw(1, 5, 16)
    q, k, v = F.linear(h, attention.qkv.weight, attention.qkv.bias).chunk(3, dim=-1)
    heads = [slice(0, 8), slice(8, 16)]
    mixed = [(q[..., i] @ k[..., i].mT / 8**0.5).softmax(-1) @ v[..., i] for i in heads]
    torch.testing.assert_close(attention(h), attention.out(torch.cat(mixed, dim=-1)))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_heads 8 does not divide d_model 20"):
        TransformerConfig(d_model=20)


# ------------------------------------------------------------------ Mamba-2


def mamba_ssm_shapes(d_model: int, d_inner: int, heads: int, groups: int, d_state: int) -> dict[str, tuple[int, ...]]:
    conv_dim = d_inner + 2 * groups * d_state
    return {
        "in_proj.weight": (d_inner + conv_dim + heads, d_model),
        "conv1d.weight": (conv_dim, 1, 4),
        "conv1d.bias": (conv_dim,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (d_inner,),
        "out_proj.weight": (d_model, d_inner),
    }


def test_a_block_has_the_parameters_of_mamba_ssm() -> None:
    block = build(Mamba2Config(d_model=64, headdim=16, ngroups=2, d_state=8)).get_submodule("blocks.1")
    assert {name: tuple(value.shape) for name, value in block.state_dict().items()} == mamba_ssm_shapes(
        64, 128, 8, 2, 8
    )
    marked = {name for name, value in block.named_parameters() if getattr(value, "_no_weight_decay", False)}
    assert marked == {"dt_bias", "A_log", "D"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 46, 150])
def test_a_block_agrees_with_transformers_mamba2(length: int, groups: int) -> None:
    import_torchvision()
    from transformers import Mamba2Config as OracleConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    block = build(Mamba2Config(d_model=64, headdim=16, ngroups=groups, d_state=16)).get_submodule("blocks.0")
    oracle = Mamba2Mixer(
        OracleConfig(
            hidden_size=64, num_heads=8, head_dim=16, n_groups=groups, state_size=16, chunk_size=32, num_hidden_layers=1
        ),
        layer_idx=0,
    )  # fmt: skip
    oracle.load_state_dict(block.state_dict(), strict=True)
    h = draw(2, length, 64)
    with torch.no_grad():
        torch.testing.assert_close(block(h), oracle.eval()(h), rtol=1e-5, atol=1e-5)


def test_initial_rates_lie_where_mamba_ssm_draws_them() -> None:
    with rng.initialising(0, "dt"):
        dt = F.softplus(initial_dt_bias(4096).double())
    assert 1e-3 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1 + 1e-6
    # log-uniform: the mean of log dt is the middle, to three standard errors
    assert dt.log().mean().item() == pytest.approx(torch.tensor([1e-3, 0.1]).log().mean().item(), abs=0.063)
    A = build(Mamba2Config()).get_parameter("blocks.0.A_log").exp()
    assert 1 <= A.min() < A.max() <= 16


def test_the_plain_stack_is_one_block_after_another_and_the_residual_one_adds_them() -> None:
    h = draw(2, 9, 32)
    plain = build(Mamba2Config(d_model=32, headdim=8, residual=False))
    first, second = (plain.get_submodule(f"blocks.{i}") for i in (0, 1))
    torch.testing.assert_close(plain(h), second(first(h)))
    residual = build(Mamba2Config(d_model=32, headdim=8))
    assert residual.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    middle = h + first(F.layer_norm(h, (32,)))
    torch.testing.assert_close(residual(h), middle + second(F.layer_norm(middle, (32,))))


def test_block_widths_express_the_large_core_of_the_release() -> None:
    config = Mamba2Config(d_model=32, block_widths=(32, 64), headdim=8, d_state=4, residual=False)
    core = build(config)
    assert core.out_dim == 64
    shapes = {name: tuple(value.shape) for name, value in core.get_submodule("blocks.1").state_dict().items()}
    assert shapes == mamba_ssm_shapes(64, 128, 16, 1, 4) | {"in_proj.weight": (128 + 128 + 8 + 16, 32)}
    assert core(draw(1, 5, 32)).shape == (1, 5, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 128}, "divisible by 8.*headdim: 32 with d_state: 64 works"),
        ({"headdim": 60}, "headdim 60 does not divide.*headdim: 32"),
        ({"d_state": 3}, "d_state 3.*d_state: 4 works"),
        ({"ngroups": 3}, "ngroups 3 does not divide the 8 heads"),
        ({"block_widths": [64, 128]}, "residual: false"),
        ({"block_widths": [64], "residual": False}, "num_layers is 2"),
    ],
)
def test_widths_that_a_gpu_cannot_run_are_refused_on_every_backend(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Mamba2Config(backend="torch", **settings)


def test_the_advice_on_widths_works() -> None:
    assert isinstance(build(Mamba2Config(d_model=128, headdim=32)).get_submodule("blocks.0"), Mamba2Block)
