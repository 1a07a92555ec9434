"""Numbers that break careless code, through every stage: NaN, infinity, denormals, tensors that never vary, empty ones.

Networks here are random, never trained: what is asked is whether values survive, not whether answers are right.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rpgcli import artifact, pipeline
from rpgcli.alignment import Aligner
from rpgcli.errors import ArtifactError, LayoutError, RpgError
from rpgcli.evaluation.audit import Auditor, Candidate
from rpgcli.generation import default_request
from rpgcli.models import find_source
from rpgcli.pipeline import Run
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.recipe import Recipe, load
from rpgcli.targets import CnnConfig, ConvNet3Config, Mlp3Config, RpgCnnConfig, TargetConfig, TimmConfig
from rpgcli.tasks import MultiClassConfig
from rpgcli.tokens import VARIANCE_MIN, VARIANCE_SHARE, TokenStore, detokenize, tokenize
from rpgcli.training import CHECKPOINT
from rpgcli.zoo import Zoo
from tests.helpers import State, draw, raw, same_bits, token_store

CPU = torch.device("cpu")
ARCHITECTURES: dict[str, TargetConfig] = {
    "cnn": CnnConfig(),
    "mlp3": Mlp3Config(hidden=(6, 5)),
    "convnet3": ConvNet3Config(width=4),
    "rpg-cnn": RpgCnnConfig(),
    "batch norm": TimmConfig(name="test_resnet"),
    "layer norm": TimmConfig(name="test_vit"),
    "depth-wise": TimmConfig(name="test_efficientnet"),
    "depth-wise, layer norm": TimmConfig(name="test_convnext"),
}
EACH = pytest.mark.parametrize("target", ARCHITECTURES.values(), ids=ARCHITECTURES)
TINY_VALUES = torch.tensor([1e-45, -1e-40, 1e-39, -0.0, 0.0, 6e-8, -1e-5])
"""Denormals of float32 and bfloat16, down to the smallest; zeros; denormals of float16."""


def skeleton(target: TargetConfig) -> State:
    """The target's state dict without values."""
    with torch.device("meta"):
        return dict(target.build(1, (8, 8), 10).state_dict())


def planted(names: State, i: int) -> State:
    """Random network i with denormals, a tensor of nothing else, one that never varies and one of zeros in it."""
    state = {}
    generated = [name for name, value in names.items() if value.is_floating_point() and value.numel() > 1]
    plain = [name for name in generated if not name.endswith("running_var")]
    for name, value in names.items():
        if not value.is_floating_point():
            state[name] = torch.full(value.shape, 100 + i, dtype=value.dtype)
            continue
        x = 0.1 * draw(*value.shape, seed=1000 * i + len(state)) if value.dim() else torch.tensor(0.5 + i)
        state[name] = (x.square() + 0.5 if name.endswith("running_var") else x).to(value.dtype)
    few, still, zero, small = plain[0], plain[-1], plain[len(plain) // 2], plain[len(plain) // 3]
    state[small] = state[small] * 1e-38
    state[zero] = torch.zeros_like(state[zero])
    state[still] = torch.full_like(state[still], 1 / 3)
    state[few].view(-1)[: len(TINY_VALUES)] = TINY_VALUES[: state[few].numel()] * (i + 1)
    return state


def assert_survived(found: Mapping[str, Tensor], state: State, first: State) -> None:
    """Names in order, dtypes and integers exactly; values to rounding, running variances above their floor too.

    Standardising and back is a difference, a quotient, a product and a sum: 4e-6 of the tensor's largest value (as in
    test_tokens.py), and a few steps of the smallest denormal.
    """
    assert list(found) == list(state)
    for name, value in state.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        if not value.is_floating_point() or value.numel() <= 1:
            assert raw(found[name]) == raw(value), name
            continue
        largest = float(max(value.double().abs().max(), first[name].double().abs().max()))
        atol = 4e-6 * largest + 1e-44
        if name.endswith("running_var"):
            atol = 3e-5 * largest + VARIANCE_MIN * VARIANCE_SHARE * float(first[name].double().mean())
        rtol = torch.finfo(value.dtype).eps if value.dtype != torch.float32 else 0
        torch.testing.assert_close(found[name].double(), value.double(), atol=atol, rtol=rtol, msg=name)


def assert_store_is_sound(store: TokenStore, states: Sequence[State]) -> None:
    """Statistics and standardised tokens are finite, padding is zero, and networks come back."""
    statistics = store.statistics
    assert all(bool(value.isfinite().all()) for value in statistics.tensors().values())
    assert bool((statistics.scale > 0).all())
    for i, state in enumerate(states):
        tokens = store.network(i)
        assert bool(tokens.isfinite().all()) and not tokens[~store.layout.mask()].any()
        again = statistics.standardise(tokenize(state, store.layout, statistics.references))
        assert torch.equal(tokens, again)
        assert_survived(detokenize(again, store.layout, statistics, store.constants(i)), state, states[0])


# --- any tensors ------------------------------------------------------------------------------------------------------

SHAPES = [(), (1,), (0,), (0, 3), (2,), (7,), (2, 3), (3, 1, 2, 2)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "random": lambda common, own: common + own,
    "denormal": lambda common, own: own * 1e-40,
    "zero": lambda common, own: torch.zeros_like(own),
    "still": lambda common, own: common,
    "far": lambda common, own: 1e4 + 0.01 * own,
    "one differs": lambda common, own: torch.where(torch.arange(own.numel()).view(own.shape) == 0, own, common),
    "wide": lambda common, own: own * 10.0 ** torch.linspace(-30, 3, own.numel()).view(own.shape),
}
"""Values from what all networks have in common and what is this one's own."""
TENSORS = st.tuples(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(sorted(KINDS)), st.booleans()
)  # shape, dtype, values, whether it is a running variance


def any_network(tensors: Sequence[tuple[tuple[int, ...], torch.dtype, str, bool]], seed: int, i: int) -> State:
    state: State = {"first": draw(5, seed=seed + 77 * i)}
    for k, (shape, dtype, kind, is_variance) in enumerate(tensors):
        value = KINDS[kind](draw(*shape, seed=seed + k), draw(*shape, seed=seed + k + 1000 * (i + 1)))
        value = (value.square() + 0.5).clamp(max=1e4) if is_variance else value
        state[f"{k}.running_var" if is_variance else f"{k}"] = value.to(dtype)
    state["tied"] = state["first"]
    return state


@settings(deadline=None, max_examples=60)
@given(
    tensors=st.lists(TENSORS, max_size=6), num=st.integers(2, 4), seed=st.integers(0, 10**6),
    granularity=st.sampled_from(["flat", "layer", "channel"]), token_dim=st.sampled_from([1, 3, 16]),
    standardise=st.sampled_from(["parameter", "layer", "none"]),
)  # fmt: skip
def test_any_tensors_survive_tokens(tmp_path_factory, tensors, num, seed, granularity, token_dim, standardise):
    """Among them empty ones, tied ones and half types; bit for bit where nothing is standardised."""
    states = [any_network(tensors, seed, i) for i in range(num)]
    folder = tmp_path_factory.mktemp("any") / "tokens"
    store = token_store(folder, states, token_dim=token_dim, granularity=granularity, standardise=standardise)
    if standardise == "none":
        assert all(same_bits(store.state(i), state) for i, state in enumerate(states))
    else:
        assert_store_is_sound(store, states)
    still = [name for name in states[0] if all(raw(state[name]) == raw(states[0][name]) for state in states)]
    found = store.state(num - 1)
    for name in still:  # What never varies is its mean, to the last bit.
        if not name.endswith("running_var"):
            assert torch.equal(found[name], states[0][name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (4, 3)])
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(tmp_path, value, dtype, shape):
    good = {"first": draw(5), "spoilt": draw(*shape).to(dtype), "count": torch.tensor(3)}
    bad = {name: x.clone() for name, x in good.items()}
    bad["spoilt"].view(-1)[-1] = value
    for states in ([good, bad], [bad, good]):
        with pytest.raises(LayoutError, match="spoilt holds NaN or infinity"):
            token_store(tmp_path / "tokens", states, token_dim=4)
    assert not (tmp_path / "tokens").exists() and not (tmp_path / "tokens.partial").exists()


# --- hidden units -----------------------------------------------------------------------------------------------------

ALIGNED = {name: ARCHITECTURES[name] for name in ("cnn", "mlp3", "convnet3", "rpg-cnn", "layer norm")}


@pytest.mark.parametrize("enters", [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("where", ["network", "reference", "both"])
@pytest.mark.parametrize("target", ALIGNED.values(), ids=ALIGNED)
def test_units_that_almost_nothing_or_far_too_much_enters_are_aligned(target, where, enters):
    """Such as ReLUs that died, and whose weights decayed: aligned networks are finite and compute the same."""
    problem = Problem(ProblemConfig(target=target, task=MultiClassConfig()), None, False, CPU)
    with torch.device("meta"):
        groups = target.symmetries(target.build(1, (8, 8), 10))
    states = [dict(problem.build("network", seed=seed).state_dict()) for seed in range(2)]
    for i, state in enumerate(states):
        if where in (("reference", "network")[i], "both"):
            for axis in groups[-1].axes:
                if axis.name.endswith(("weight", "bias")) and axis.power >= 0 and axis.dim == 0:
                    value = state[axis.name].clone()
                    value[axis.places[0]] = enters
                    state[axis.name] = value
    found = Aligner(states[0], groups)(states[1]).state
    assert list(found) == list(states[1])
    assert all(bool(value.isfinite().all()) for value in found.values())
    if abs(enters) < 1:
        before, after = (next(iter(problem.logits_of([state], "test"))) for state in (states[1], found))
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


# --- architectures ----------------------------------------------------------------------------------------------------


def round_trip(network: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Three planted networks to tokens and back, and one with a single NaN to an error that names its tensor.

    Args:
        network: On `meta`.
        folder: For the tokens.
        dtype: Of the networks' parameters.
    """
    names = dict(network.to(dtype).state_dict())
    states = [planted(names, i) for i in range(3)]
    store = token_store(folder / "tokens", states, token_dim=4096)
    assert_store_is_sound(store, states)
    for i, state in enumerate(states):
        found = store.state(i)
        network.load_state_dict(found, strict=True, assign=True)
        loaded = network.state_dict()
        assert list(loaded) == list(found)
        assert all(raw(loaded[name]) == raw(value) for name, value in state.items() if not value.is_floating_point())
    floats = [name for name, value in names.items() if value.is_floating_point()]
    for name in {floats[0], floats[len(floats) // 2], floats[-1]}:
        bad = states[1] | {name: states[1][name].clone()}
        bad[name].view(-1)[-1] = math.nan
        with pytest.raises(LayoutError) as error:
            tokenize(bad, store.layout, store.statistics.references)
        assert error.value.what == f"{name} holds NaN or infinity."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH
def test_every_architecture_survives_tokens_and_names_what_is_not_finite(target, dtype, tmp_path):
    with torch.device("meta"):
        network = target.build(1, (8, 8), 10)
    round_trip(network, tmp_path, dtype)


SMALL = [
    "task.kind=multi-class", "tokens.token_dim=512", "generate.count=2", "generate.num_steps=2",
    "rpg.core={kind: mamba2, d_model: 32, headdim: 8, d_state: 8, num_layers: 1}",
    "rpg.denoiser={kind: mlp, width: 8, depth: 1}", "rpg.training={num_steps: 2, batch_size: 2}",
    "autoencoder.network={kind: mlp, latent_dim: 2, widths: [4]}", "autoencoder.training={num_steps: 2, batch_size: 4}",
    "diffusion.denoiser={kind: mlp, width: 8, depth: 1}", "diffusion.training={num_steps: 2, batch_size: 4}",
]  # fmt: skip


def recipe_for(target: TargetConfig, *more: str) -> Recipe:
    return load(None, [*SMALL, *more], target=target)


def imported(target: TargetConfig, folder: Path, recipe: Recipe) -> tuple[Run, list[State]]:
    """A run with the zoo and the tokens of four planted networks."""
    names = skeleton(target)
    states = [planted(names, i) for i in range(4)]
    (folder / "given").mkdir()
    for i, state in enumerate(states):
        artifact.write_tensors(folder / "given" / f"{i}.safetensors", state)
    run = Run(folder / "run")
    pipeline.run_collect(run, recipe, source=folder / "given")
    pipeline.run_tokenize(run, recipe)
    return run, states


@EACH
def test_every_architecture_goes_through_every_stage(target, tmp_path):
    """Networks are written whole and finite, with what never varies and the integers as they were; the autoencoder,
    both generators and the eyes of the audit take whatever the numbers are."""
    recipe = recipe_for(target)
    run, states = imported(target, tmp_path, recipe)
    zoo = Zoo.read(run.at("zoo"))
    store = TokenStore(artifact.read(run.at("tokens"), "tokenize"))
    whole = [{**zoo.shared, **zoo.state(network)} for network in zoo.networks]
    for i, state in enumerate(states):
        assert all(raw(whole[i][name]) == raw(value) for name, value in state.items())
        assert_survived(store.state(i), state, states[0])
    pipeline.run_train_ae(run, recipe)
    pipeline.run_train_diffusion(run, recipe, allow_bad=True)
    pipeline.run_train_rpg(run, recipe)
    problem = run.open(recipe.problem())
    fixed = [name for name, value in states[0].items() if all(torch.equal(value, state[name]) for state in states)]
    made: list[State] = []
    for method in ("rpg", "pdiff"):
        source = find_source(run.folder, method)
        found = Zoo(pipeline.run_generate(run, recipe, source, default_request(source, recipe.generate)))
        made += [found.state(network) for network in found.networks]
    for state in made:
        problem.build("any").load_state_dict(state, strict=True)
        assert state.keys() == states[0].keys()
        assert all(bool(value.isfinite().all()) for value in state.values())
        for name, value in states[0].items():
            if name in fixed or not value.is_floating_point():
                assert torch.equal(state[name], value), name
    assert len(made) == 4 and fixed

    auditor = Auditor(problem, store, zoo)
    name = next(name for name in made[0] if made[0][name].numel() > 1)
    broken = [{**made[0], name: torch.full_like(made[0][name], value)} for value in (math.nan, math.inf, -math.inf)]
    files = ["nan", "inf", "-inf"]
    look = auditor.look(Candidate(state, file=file) for state, file in zip([*broken, states[0]], [*files, "good"]))
    assert [*look.failed][:3] == files and len(look.seen) + len(look.failed) == 4


# --- numbers that break on the way ------------------------------------------------------------------------------------

WILD = "{num_steps: 8, learning_rate: 1e30, schedule: constant, gradient_clip: 0, checkpoint_every: 1, log_every: 1}"
TRAINED = {
    "rpg": ("rpg.training", pipeline.run_train_rpg),
    "autoencoder": ("autoencoder.training", pipeline.run_train_ae),
    "diffusion": ("diffusion.training", lambda run, recipe: pipeline.run_train_diffusion(run, recipe, allow_bad=True)),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of networks that generators were trained on. Do not change it."""
    recipe = recipe_for(ARCHITECTURES["mlp3"])
    run, _ = imported(ARCHITECTURES["mlp3"], tmp_path_factory.mktemp("small"), recipe)
    for folder in ("autoencoder", "diffusion", "rpg"):
        TRAINED[folder][1](run, recipe)
    return run


@pytest.mark.parametrize("folder", TRAINED)
def test_a_training_that_diverges_stops_with_its_step_the_last_good_checkpoint_and_a_hint(small, tmp_path, folder):
    section, train = TRAINED[folder]
    run = Run(tmp_path / "run")
    for name in ("tokens", "autoencoder"):
        if name != folder:
            shutil.copytree(small.folder / name, run.folder / name)
    with pytest.raises(RpgError, match=r"no longer finite at step (\d+)\.") as error:
        train(run, recipe_for(ARCHITECTURES["mlp3"], f"{section}={WILD}"))
    kept = artifact.read_tensors(run.folder / f"{folder}.partial" / CHECKPOINT)
    step = int(kept["step"])
    assert f"at step {step + 1}." in error.value.what
    (hint,) = error.value.advice
    assert "learning_rate" in hint and f"The checkpoint of step {step} is intact." in hint
    assert all(bool(value.isfinite().all()) for name, value in kept.items() if name.startswith("model."))
    assert not (run.folder / folder).exists()


@pytest.mark.parametrize("method", ["rpg", "pdiff"])
def test_a_generated_network_that_is_not_finite_is_refused_with_its_tensor(small, tmp_path, method):
    hot = recipe_for(ARCHITECTURES["mlp3"], "generate.temperature=1e38")
    source = find_source(small.folder, method)
    with pytest.raises(RpgError, match=r"has NaN or infinity in layers\.\d\.\w+\.") as error:
        pipeline.run_generate(replace(small, out=tmp_path / "out"), hot, source, default_request(source, hot.generate))
    assert "lower the temperature" in "".join(error.value.advice)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@EACH
def test_a_zoo_is_not_made_of_networks_that_are_not_finite(target, tmp_path, value):
    """The message names the file and the tensor."""
    names = skeleton(target)
    (tmp_path / "given").mkdir()
    for i in range(2):
        state = planted(names, i)
        name = next(name for name, x in reversed(state.items()) if x.is_floating_point())
        state[name].view(-1)[0] = value if i else 0
        artifact.write_tensors(tmp_path / "given" / f"{i}.safetensors", state)
    with pytest.raises(ArtifactError, match=rf"1\.safetensors: 1 of \d+ values of {name} are not finite"):
        pipeline.run_collect(Run(tmp_path / "run"), recipe_for(target), source=tmp_path / "given")
    assert not (tmp_path / "run" / "zoo").exists()
