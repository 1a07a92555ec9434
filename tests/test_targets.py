"""Target networks: parameter counts of the papers, shapes, bad names."""

import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from rpgcli import rng
from rpgcli.errors import RecipeError, UsageError
from rpgcli.targets import (
    FAMILIES,
    CnnConfig,
    ConvNet3Config,
    Mlp3Config,
    Target,
    TargetConfig,
    TimmConfig,
    parse_arch,
    prepare,
    torchvision_shim,
)

SMALL = [config() for config in FAMILIES.values()]
TIMM = ["resnet18", "resnet50", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "efficientnet_lite0"]
EVERY: list[Target] = [*SMALL, TimmConfig(name="mobilenetv3_small_050")]


def build(config: Target, channels: int, size: tuple[int, int], num_outputs: int, seed: int = 0) -> torch.nn.Module:
    with rng.initialising(seed, "target"):
        return config.build(channels, size, num_outputs)


def num_parameters(*arguments: Any) -> int:
    return sum(p.numel() for p in build(*arguments).parameters())


def test_cnn_has_the_5178_parameters_of_the_prototype_and_about_as_many_at_other_sizes():
    assert num_parameters(CnnConfig(), 1, (8, 8), 2) == 5178
    assert num_parameters(CnnConfig(), 3, (96, 96), 2) == 5178 + 2 * 8 * 9
    assert list(build(CnnConfig(), 1, (8, 8), 2).state_dict())[::2] == [
        f"{n}.weight" for n in ("c1", "c2", "c3", "fc", "head")
    ]


def test_convnet3_has_the_parameter_counts_of_the_paper():
    assert num_parameters(ConvNet3Config(), 3, (32, 32), 10) == 24_714  # p-diff Tab. 2, CIFAR-10
    assert num_parameters(ConvNet3Config(), 3, (32, 32), 100) == 70_884  # p-diff Tab. 2, CIFAR-100


def test_mlp3_has_the_parameter_counts_of_the_paper():
    assert num_parameters(Mlp3Config(), 1, (28, 28), 10) == 39_760  # p-diff Tab. 2, MNIST
    assert num_parameters(Mlp3Config(hidden=(50, 25), first_bias=False), 3, (32, 32), 10) == 155_135  # CIFAR-10


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.kind)
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (1, (28, 28)), (3, (32, 32)), (3, (33, 20)), (1, (4, 4))])
def test_every_target_maps_images_of_any_size_to_logits_and_loads_its_state_strictly(config, channels, size):
    network = build(config, channels, size, 2).eval()
    input_size = config.input_size(size)
    assert config.input_size(input_size) == input_size
    x = torch.randn(2, channels, *size, generator=rng.stream(0, "x"))
    y = network(prepare(x, input_size))
    assert y.shape == (2, 2)

    other = build(config, channels, size, 2, seed=1).eval()
    assert not torch.equal(other(prepare(x, input_size)), y)
    other.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(other(prepare(x, input_size)), y)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.kind)
def test_initial_parameters_follow_from_the_seed_and_leave_the_global_generator_alone(config):
    before = torch.get_rng_state()
    first, second = (build(config, 1, (8, 8), 2).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.kind)
def test_every_target_is_built_on_meta_without_memory(config):
    with torch.device("meta"):
        layout = config.build(3, (32, 32), 10).state_dict()
    real = build(config, 3, (32, 32), 10).state_dict()
    assert all(tensor.is_meta for tensor in layout.values())
    assert [(n, t.shape, t.dtype) for n, t in layout.items()] == [(n, t.shape, t.dtype) for n, t in real.items()]


@pytest.mark.parametrize("config", SMALL, ids=lambda c: c.kind)
@pytest.mark.parametrize("size", [(8, 8), (28, 28)])
def test_batched_targets_train_many_at_once_with_the_gradients_of_one(config, size):
    assert config.batched
    networks = [build(config, 1, size, 2, seed) for seed in range(3)]
    assert not list(networks[0].buffers())
    x, y = prepare(torch.randn(5, 1, *size, generator=rng.stream(0, "x")), config.input_size(size)), torch.arange(5) % 2

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(functional_call(networks[0], parameters, (x,)), y)

    each = [{n: p.detach() for n, p in network.named_parameters()} for network in networks]
    many = vmap(grad(loss))({name: torch.stack([e[name] for e in each]) for name in each[0]})
    for i, parameters in enumerate(each):
        for name, expected in grad(loss)(parameters).items():
            torch.testing.assert_close(many[name][i], expected, rtol=1e-4, atol=1e-6)  # another order of summation


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_take_grey_digits_and_two_classes(name):
    config = parse_arch(name)
    assert config == parse_arch(f"timm/{name}") == TimmConfig(name=name)
    assert not config.batched
    assert config.input_size((8, 8)) == (32, 32)
    network = build(config, 1, (8, 8), 2)
    assert network.training
    with torch.no_grad():
        assert network.eval()(prepare(torch.zeros(2, 1, 8, 8), (32, 32))).shape == (2, 2)


def test_timm_networks_with_patches_get_a_size_that_the_patches_divide():
    assert TimmConfig(name="vit_tiny_patch16_224").input_size((96, 40)) == (96, 64)
    assert TimmConfig(name="vit_small_patch14_dinov2").input_size((32, 32)) == (42, 42)
    assert TimmConfig(name="resnet18", image_size=224).input_size((8, 8)) == (224, 224)


def test_a_timm_network_that_cannot_take_the_images_is_refused_with_its_own_size():
    with pytest.raises(RecipeError, match=r"inception_v3 cannot take images of 1x32x32") as caught:
        TimmConfig(name="inception_v3").build(1, (8, 8), 2)
    assert "299x299" in str(caught.value)


def test_unknown_architectures_suggest_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown architecture 'resnt18'; did you mean 'resnet18'"):
        parse_arch("resnt18")
    with pytest.raises(UsageError, match=r"did you mean 'convnet3'"):
        parse_arch("con3net")
    with pytest.raises(RecipeError, match=r"timm knows no model 'resnet_18'; did you mean 'resnet18'"):
        TimmConfig(name="resnet_18").build(1, (8, 8), 2)


@pytest.mark.parametrize("text", ["", "timm/", "timm", "hf-hub:someone/model", "timm/local-dir:/tmp", "../resnet18"])
def test_names_that_would_read_or_download_something_are_unknown(text):
    with pytest.raises(UsageError, match="unknown architecture"):
        parse_arch(text)
    with pytest.raises((ValidationError, RecipeError)):
        TimmConfig(name=text.removeprefix("timm/")).build(1, (8, 8), 2)


def test_a_name_with_a_tag_of_pretrained_weights_is_refused():
    with pytest.raises(UsageError, match="names pretrained weights"):
        parse_arch("resnet18.a1_in1k")


def test_torchvision_that_loads_by_itself_gets_no_operators_declared(monkeypatch):
    before = torchvision_shim._declare_missing_operators.cache_info()
    monkeypatch.setattr("importlib.import_module", lambda name: types.ModuleType(name))
    assert torchvision_shim.import_torchvision().__name__ == "torchvision"
    assert torchvision_shim._declare_missing_operators.cache_info() == before


def test_another_failure_of_torchvision_is_not_hidden(monkeypatch):
    def fail(name: str) -> None:
        raise RuntimeError("another failure")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(RuntimeError, match="another failure"):
        torchvision_shim.import_torchvision()


def test_our_own_names_need_no_timm():
    code = "import sys; from rpgcli.targets import parse_arch; parse_arch('cnn'); sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.kind)
def test_every_target_survives_the_way_through_plain_data(config):
    adapter: TypeAdapter[Any] = TypeAdapter(TargetConfig)
    assert adapter.validate_python(config.model_dump(mode="json")) == config


def test_prepare_changes_nothing_where_images_fit_and_keeps_constant_images_constant():
    x = torch.randn(2, 1, 8, 8, generator=rng.stream(0, "x"))
    assert prepare(x, (8, 8)) is x
    torch.testing.assert_close(prepare(torch.full((1, 3, 8, 8), 0.5), (32, 20)), torch.full((1, 3, 32, 20), 0.5))
