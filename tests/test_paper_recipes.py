"""The paper's settings: each at its full size on `meta`, and in use with the real number of tokens, 1/16 as wide."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from rpgcli import planning, rng
from rpgcli.alignment import fits
from rpgcli.collection import OptimiserConfig, TrajectoryConfig, collect
from rpgcli.conditions import Asked, make_condition
from rpgcli.cores.mamba2 import Mamba2Config
from rpgcli.denoisers.conv import ConvDenoiserConfig
from rpgcli.generation import Generator, Sample, Sampling
from rpgcli.layout import Layout, TensorSpec
from rpgcli.methods.rpg import RpgConfig, build, make_loss
from rpgcli.models import assemble
from rpgcli.planning import Known
from rpgcli.progress import silent
from rpgcli.recipe import Recipe, embedded, load
from rpgcli.targets import RpgCnnConfig
from rpgcli.tokens import TokensConfig, TokenStore, write_store
from rpgcli.training import Trainer
from tests.helpers import make, tiny_problem

FOLD = 16
EXPECTED = {
    "imagenet-resnet18": (11_699_112, 1510, 50),
    "imagenet-resnet50": (25_610_152, 3329, 50),
    "imagenet-vit-tiny": (5_717_416, 808, 50),
    "imagenet-vit-small": (22_050_664, 2786, 50),
    "imagenet-vit-base": (86_567_656, 5378, 50),
    "imagenet-convnext-atto": (3_695_520, 552, 50),
    "imagenet-convnext-large": (197_767_336, 12_311, 50),
    "cifar10-resnet18": (11_191_242, 1448, 50),
    "cifar10-mobilenetv3": (4_239_242, 1259, 50),
    "cifar10-vit-base": (85_806_346, 5332, 50),
    "cifar10-cnn-small": (2864, 18, 50),
    "cifar10-cnn-medium": (10_853, 48, 50),
    "cifar10-tasks-vit-tiny": (5_524_802, 785, 5 * 922),
    "ade20k-vit-base": (86_567_656, 5378, 50),
    "coco-vit-base": (86_567_656, 5378, 50),
}
"""Generated values (running statistics of batch norms included), tokens, checkpoints."""
PAPER = [name for name in embedded() if name.startswith("paper/")]
SLOW = {
    "imagenet-resnet18", "imagenet-resnet50", "imagenet-vit-small", "imagenet-vit-base", "imagenet-convnext-large",
    "cifar10-vit-base", "ade20k-vit-base", "coco-vit-base",
}  # fmt: skip
"""Half a minute and more on one core, or the same as another one."""


@cache
def planned(name: str) -> tuple[Recipe, Known, Layout]:
    """A recipe, and what it plans with neither a run nor a data set."""
    recipe = load(name)
    found = planning.known_of(recipe, None, None)
    return recipe, found, planning.layout_of(recipe, found, None)


@pytest.mark.parametrize("name", PAPER)
def test_a_setting_of_the_paper_builds_at_its_full_size(name):
    recipe, found, layout = planned(name)
    assert (layout.num_parameters, layout.num_tokens, len(found.seen)) == EXPECTED[name.removeprefix("paper/")]
    assert layout.num_tokens == sum(math.ceil(spec.numel / layout.token_dim) for spec in layout.generated)
    model = planning.rpg_of(recipe, layout, found)
    assert model.position.is_meta and model.position.shape == (layout.num_tokens, recipe.rpg.core.d_model)
    if model.condition is not None:
        assert [p.shape for p in model.condition.parameters()] == [(1024, 10), (1024,), (8192, 1024), (8192,)]


def test_every_setting_is_expected():
    assert sorted(EXPECTED) == [name.removeprefix("paper/") for name in PAPER]


def sixteenth(recipe: Recipe, layout: Layout) -> tuple[RpgConfig, Layout]:
    """The same model and layout, 1/16 as wide: each tensor has 1/16 of its values, and as many tokens as before."""
    specs = tuple(
        TensorSpec(spec.name, (math.ceil(spec.numel / FOLD),), "float32", "generated") for spec in layout.generated
    )
    core, denoiser, rpg = recipe.rpg.core, recipe.rpg.denoiser, recipe.rpg
    assert isinstance(core, Mamba2Config) and isinstance(denoiser, ConvDenoiserConfig)
    inner = core.expand * core.d_model // FOLD
    widths = core.block_widths and tuple(width // FOLD for width in core.block_widths)
    narrow = Mamba2Config(
        d_model=core.d_model // FOLD, block_widths=widths, d_state=core.d_state // FOLD,
        headdim=min(core.headdim, inner // 4), residual=core.residual,
    )  # fmt: skip
    channels = tuple(max(1, channels // FOLD) for channels in denoiser.channels)
    config = rpg.model_copy(update={
        "core": narrow, "denoiser": ConvDenoiserConfig(channels=channels),
        "d_condition": rpg.d_condition and rpg.d_condition // FOLD,
        "training": rpg.training.model_copy(update={"batch_size": 1}),
    })  # fmt: skip
    return config, Layout(specs, layout.token_dim // FOLD, layout.granularity)


def store_of(folder: Path, layout: Layout, config: TokensConfig, *, bits: bool) -> TokenStore:
    """Two checkpoints of random values."""
    generator = rng.stream(0, "test")
    states = [{s.name: torch.randn(s.shape, generator=generator) for s in layout.generated} for _ in range(2)]

    def body(draft):
        write_store(draft, iter(states), len(states), layout, config, silent)
        task_bits = "0010100000" if bits else None
        return {"checkpoints": [{"task_bits": task_bits, "run": 0, "step": i} for i in range(len(states))]}

    return TokenStore(make(folder, body, stage="tokenize"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name.removeprefix("paper/") in SLOW)) for name in PAPER
    ],
)  # fmt: skip
def test_a_setting_of_the_paper_trains_and_generates_with_its_number_of_tokens(name, tmp_path):
    recipe, found, full = planned(name)
    config, layout = sixteenth(recipe, full)
    assert layout.num_tokens == full.num_tokens and layout.token_dim * FOLD == full.token_dim
    store = store_of(
        tmp_path / "tokens",
        layout,
        recipe.tokens.model_copy(update={"token_dim": layout.token_dim}),
        bits=found.has_bits,
    )
    condition = make_condition(config.condition, config.levels, store.checkpoints, section="rpg")
    model = build(config, store, condition)
    assert (condition is not None, model.state is not None) == (found.has_bits, not found.has_bits)

    trainer = Trainer(model.train(), config.training)
    loss = make_loss(model, config, store, condition, torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        trainer.advance(loss(step))
    trainer.check_finite()
    changed = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert changed > 0.9 * len(before)

    num_states = model.state.num_embeddings if model.state is not None else 1
    parts = assemble(model, None, condition, num_states, layout, store.statistics, store.constants(0))
    generator, given = Generator(parts), recipe.generate
    assert given.sampler is not None
    sampling = Sampling(sampler=given.sampler, num_steps=2)
    asked = Asked("seen", "0010100000" if found.has_bits else None)
    tokens, _ = generator.tokens(Sample(asked, 0), sampling, seed=0, state=given.state)
    state = generator.network(tokens)
    assert {n: v.shape for n, v in state.items()} == {s.name: s.shape for s in layout.generated}


def test_the_compared_cnns_have_the_parameters_of_the_release():
    for config, expected in ((RpgCnnConfig(), 2864), (RpgCnnConfig(variant="medium"), 10_853)):
        with torch.device("meta"):
            network = config.build(3, (32, 32), 10)
            y = network(torch.empty(2, 3, *config.input_size((32, 32))))
        assert y.shape == (2, 10)
        assert sum(p.numel() for p in network.parameters()) == expected
        groups = config.symmetries(network)
        assert len(groups) == 4 and fits(groups, network.state_dict())


def test_snapshots_can_begin_at_the_very_start(tmp_path):
    """As of the networks with published weights, which are not trained before they are saved."""
    problem = tiny_problem(bits=False)
    config = TrajectoryConfig(
        num_checkpoints=2,
        training=OptimiserConfig(epochs=0),
        save=OptimiserConfig(epochs=1, batch_size=30, learning_rate=1e-9),
    )

    def body(draft):
        networks = collect(problem, config, 0, draft, download=False, on_step=silent)
        return {"networks": [network.to_json() for network in networks]}

    zoo = make(tmp_path / "zoo", body)
    start = problem.build("seed", 0).state_dict()
    assert [n["step"] for n in zoo.facts["networks"]] == [1, 2]
    for network in zoo.facts["networks"]:
        for name, value in zoo.tensors(network["file"]).items():
            torch.testing.assert_close(value, start[name], rtol=0, atol=1e-7)
