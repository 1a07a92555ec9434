"""Generation: a sample depends on its seed, what is asked, and its number alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rpgcli import generation, rng
from rpgcli.conditions import Asked, Condition
from rpgcli.cores.mamba2 import Mamba2Config
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.errors import RpgError, UsageError
from rpgcli.generation import (
    GenerateConfig,
    Generator,
    Request,
    Sample,
    Sampling,
    Source,
    condition_of,
    default_request,
    request_folder,
    request_of,
)
from rpgcli.methods import METHODS, SHORT
from rpgcli.methods.rpg import RPG, RpgConfig, build
from rpgcli.models import assemble
from rpgcli.samplers import DdimConfig, DdpmConfig, DpmSolverConfig
from rpgcli.tasks import complement
from rpgcli.tokens import TokenStore
from tests.helpers import State, draw, make, same_bits, token_store

TASKS = ["0110", "1001", "1000", "0111"]
FOUR_BITS = Condition("task-bits", 4)
CONFIG = RpgConfig(
    core=Mamba2Config(d_model=16, headdim=4, d_state=4, num_layers=1), denoiser=MlpDenoiserConfig(width=16, depth=1)
)
SAMPLINGS = [
    Sampling(sampler=DdimConfig(), num_steps=3),
    Sampling(sampler=DdimConfig(eta=0.5), num_steps=3, temperature=0.7),
    Sampling(sampler=DdpmConfig(), num_steps=3),
    Sampling(sampler=DpmSolverConfig(), num_steps=3),
]
EACH_SAMPLING = pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.sampler.kind}-{s.temperature}")


def network(i: int) -> State:
    return {
        "w": draw(4, 5, seed=i),
        "half": draw(6, seed=i).half(),
        "fixed": torch.tensor([1.0, 2.0]),
        "bn.running_var": draw(3, seed=i).square() + 0.1,
        "bn.num_batches_tracked": torch.tensor(5),
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    checkpoints = [{"task_bits": TASKS[i % 4], "run": i // 4, "step": 0} for i in range(12)]
    return token_store(
        tmp_path_factory.mktemp("store") / "tokens", [network(i) for i in range(12)], checkpoints, token_dim=8
    )


def make_generator(
    store: TokenStore, config: RpgConfig = CONFIG, condition: Condition | None = FOUR_BITS, num_states: int = 3
) -> Generator:
    """A model with random weights everywhere: a fresh one outputs zeros."""
    model = build(config, store, condition)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng.stream(0, "weights", i)), alpha=0.2)
    return Generator(assemble(model, None, condition, num_states, store.layout, store.statistics, store.constants(0)))


@pytest.fixture
def generator(store: TokenStore) -> Generator:
    return make_generator(store)


def sample(
    generator: Generator, bits: str, index: int, sampling: Sampling, *, seed: int = 0, state: str = "random"
) -> Tensor:
    return generator.tokens(Sample(Asked("unseen", bits), index), sampling, seed=seed, state=state)[0]


@EACH_SAMPLING
def test_sample_i_is_the_same_whatever_else_is_asked_for_and_in_which_order(store, sampling):
    wanted = [(bits, i) for bits in TASKS for i in range(3)]
    forwards = {key: sample(make_generator(store), *key, sampling) for key in wanted}
    one = make_generator(store)
    backwards = {key: sample(one, *key, sampling) for key in reversed(wanted)}
    assert all(torch.equal(forwards[key], backwards[key]) for key in wanted)  # bit for bit
    alone = sample(make_generator(store), "1000", 2, sampling)
    assert torch.equal(alone, forwards["1000", 2])
    values = list(forwards.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@EACH_SAMPLING
def test_many_at_once_are_each_alone_to_rounding(generator, sampling):
    together = generator.batch([Asked("unseen", bits) for bits in TASKS], sampling, seed=7)
    alone = torch.stack([sample(generator, bits, 0, sampling, seed=7) for bits in TASKS])
    # other shapes of the same matrix products: float32 rounding, carried through three steps
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_side_of_a_split_that_a_task_is_on_changes_nothing(generator):
    sides = [Sample(Asked(split, "0110"), 1) for split in ("seen", "validation", "unseen")]
    first, *others = [generator.tokens(one, SAMPLINGS[0], seed=0, state="random")[0] for one in sides]
    assert all(torch.equal(first, other) for other in others)


def test_seeds_share_no_noise(generator):
    by_seed = [{sample(generator, "0110", i, SAMPLINGS[0], seed=s).sum().item() for i in range(5)} for s in range(4)]
    assert len(set.union(*by_seed)) == 20


def test_without_starting_noise_all_samples_of_a_condition_are_one(generator):
    centre = SAMPLINGS[0].model_copy(update={"temperature": 0.0})
    samples = [sample(generator, "0110", i, centre, state="1") for i in range(3)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], sample(generator, "0110", 0, centre, state="2"))
    assert not torch.equal(samples[0], sample(generator, "1001", 0, centre, state="1"))


def test_the_core_runs_once_for_each_condition_whatever_the_steps_and_samples(generator, monkeypatch):
    monkeypatch.setattr(generation, "KEPT_BYTES", 16 * 4 * generator.model.mask.shape[0] * CONFIG.core.d_model)
    calls: list[int] = []
    assert isinstance(generator.model.method, RPG)
    generator.model.method.core.register_forward_hook(lambda *_: calls.append(1))
    conditions = set()
    for bits in ("0110", "1001"):
        for index in range(8):
            for sampling in SAMPLINGS:
                _, state = generator.tokens(Sample(Asked("unseen", bits), index), sampling, seed=0, state="random")
                conditions.add((bits, state))
    assert len(calls) == len(conditions) > 4
    for index in range(40):  # no more prototypes are kept than a few
        generator.prototypes(Asked(task_bits=format(index % 16, "04b")), index % 3)
    assert len(generator._prototypes) == 16


@EACH_SAMPLING
def test_a_network_in_blocks_has_noise_of_its_own_in_each_and_comes_tensor_by_tensor(
    generator, store, monkeypatch, sampling
):
    whole = generator.tokens(Sample(Asked("unseen", "0110"), 1), sampling, seed=3, state="1")[0]
    monkeypatch.setattr(generation, "BLOCK_VALUES", 8 * 2)  # Two tokens.
    blocks, _ = generator.blocks(Sample(Asked("unseen", "0110"), 1), sampling, seed=3, state="1")
    tensors = generator.tensors(blocks)
    name, value = next(tensors)
    assert name == "w"  # Its tokens alone have been sampled.
    state = {name: value, **dict(tensors)}
    assert list(state) == list(network(0))
    tokens = generator.tokens(Sample(Asked("unseen", "0110"), 1), sampling, seed=3, state="1")[0]
    assert same_bits(state, generator.network(tokens))
    if sampling.sampler in (DdimConfig(), DpmSolverConfig()):  # The others draw noise on the way, of other shapes.
        torch.testing.assert_close(tokens[:2], whole[:2], rtol=1e-4, atol=1e-4)
    varies = store.statistics.varies
    assert not torch.equal(tokens[2:][varies[2:]], whole[2:][varies[2:]])
    monkeypatch.setattr(rng, "stream", lambda *name: torch.Generator().manual_seed(0))
    same = generator.tokens(Sample(Asked("unseen", "0110"), 1), sampling, seed=3, state="1")[0]
    assert not torch.equal(same, tokens)


def test_autocast_changes_samples_by_its_rounding_and_keeps_their_dtype(store):
    exact, quick = make_generator(store), Generator(make_generator(store).model, torch.bfloat16)
    tokens, expected = (sample(generator, "0110", 0, SAMPLINGS[0]) for generator in (quick, exact))
    assert tokens.dtype == torch.float32
    assert 1e-4 < float((tokens - expected).abs().max()) < 0.1


def test_the_state_can_be_chosen(generator: Generator) -> None:
    def ask(state: str, index: int = 0) -> tuple[Tensor, int]:
        return generator.tokens(Sample(Asked("unseen", "0110"), index), SAMPLINGS[0], seed=0, state=state)

    assert [ask(s)[1] for s in ("0", "1", "2", "none")] == [0, 1, 2, -1]
    tokens = [ask(s)[0] for s in ("0", "1", "2", "none")]
    assert all(not torch.equal(a, b) for i, a in enumerate(tokens) for b in tokens[:i])
    drawn = [ask("random", i)[1] for i in range(30)]
    assert set(drawn) == {0, 1, 2}
    for i in range(3):  # choosing what would have been drawn changes nothing: the noise is the same
        assert torch.equal(ask("random", i)[0], ask(str(drawn[i]), i)[0])
    for bad in ("3", "-1", "x", "", "1.0"):
        with pytest.raises(UsageError, match="does not exist"):
            ask(bad)


def test_no_state_adds_nothing_to_the_tokens(generator):
    asked = Asked("unseen", "0110")
    without = generator.model.method.prototypes(FOUR_BITS.features([asked]), None)
    assert torch.equal(generator.prototypes(asked, -1), without[0])


def test_an_unconditional_model_ignores_the_task(store):
    generator = make_generator(store, CONFIG.model_copy(update={"condition": "none", "state": "none"}), None, 1)
    tokens, state = generator.tokens(Sample(Asked(), 0), SAMPLINGS[0], seed=0, state="random")
    assert state == 0
    assert tokens.shape == (store.layout.num_tokens, 8)


@EACH_SAMPLING
def test_networks_have_the_target_s_names_dtypes_and_fixed_values(generator, store, sampling):
    tokens = sample(generator, "0110", 0, sampling)
    assert not tokens[~store.statistics.varies].any()  # padding and fixed slots stay zero at every step
    state = generator.network(tokens)
    expected = network(0)
    assert list(state) == list(expected)
    assert all(state[n].dtype == v.dtype and state[n].shape == v.shape for n, v in expected.items())
    for name in ("fixed", "bn.num_batches_tracked"):
        assert same_bits({name: state[name]}, {name: expected[name]})
    assert bool((state["bn.running_var"] > 0).all())


def test_a_network_that_is_not_finite_is_refused(generator, store):
    tokens = torch.full((store.layout.num_tokens, 8), 1e6)  # overflows float16
    with pytest.raises(RpgError, match="NaN or infinity in half") as error:
        generator.network(tokens)
    assert "temperature" in str(error.value)


def test_a_request_is_so_many_samples_of_each_task():
    first, second = Asked("seen", "01"), Asked("unseen", "10")
    found = list(Request("tasks", [first, second], 2).samples())
    assert found == [Sample(first, 0), Sample(first, 1), Sample(second, 0), Sample(second, 1)]


# --- requests ---------------------------------------------------------------------------------------------------------

SIDES = {"seen": ["0011", "0101", "1110"], "validation": ["1000"], "unseen": ["0110", "1111"]}
LEVEL = Condition("accuracy-level", 2, levels=((0.5, 0.7), (0.9, 1.0)))
LABEL = Condition("label", 2, labels=("cat", "dog"))
ACCURACY = Condition("accuracy", 1, mean=0.9, std=0.2)

Trained = Callable[[Condition | None], Source]


@pytest.fixture
def trained(tmp_path) -> Trained:
    """Models of which a request needs no more than the facts."""

    def build_source(condition: Condition | None) -> Source:
        facts: dict[str, Any] = {"condition": condition and condition.to_json(), "tasks": SIDES}
        folder = tmp_path / (condition.kind if condition else "none")
        return Source("rpg", {"rpg": make(folder, lambda draft: facts, stage="train-rpg")}, condition)

    return build_source


@pytest.mark.parametrize("condition", [None, FOUR_BITS, LABEL, LEVEL, ACCURACY], ids=lambda c: c and c.kind)
def test_the_condition_of_a_model_is_read_back(trained, condition):
    assert condition_of(trained(condition).inputs["rpg"]) == condition


@pytest.mark.parametrize(
    ("condition", "asked"),
    [
        (None, [Asked()]),
        (LABEL, [Asked(label="cat"), Asked(label="dog")]),
        (LEVEL, [Asked(accuracy=0.6), Asked(accuracy=0.95)]),
        (ACCURACY, [Asked(accuracy=0.7), Asked(accuracy=0.9), Asked(accuracy=1.0)]),
        (Condition("accuracy", 1, mean=1.0, std=1.0), [Asked(accuracy=0.0), Asked(accuracy=1.0)]),
    ],
)
def test_who_asks_for_nothing_gets_20_of_everything_that_a_model_knows(trained, condition, asked):
    found = default_request(trained(condition), GenerateConfig())
    assert (found.asked, found.count) == (asked, 20)
    for one in asked:
        if condition is not None:
            condition.check(one)
    assert default_request(trained(condition), GenerateConfig(count=3)).count == 3


def test_a_model_that_was_trained_without_its_condition_too_is_also_asked_without(tmp_path):
    section, facts = {"diffusion": {"condition_dropout": 0.1}}, {"condition": LEVEL.to_json(), "tasks": SIDES}
    trained = make(tmp_path / "diffusion", lambda draft: facts, stage="train-diffusion", section=section)
    found = default_request(Source("pdiff", {"diffusion": trained}, LEVEL), GenerateConfig())
    assert found.asked == [Asked(accuracy=0.6), Asked(accuracy=0.95), Asked()]


def test_who_asks_a_model_of_tasks_for_nothing_gets_one_of_each_task(trained):
    found = default_request(trained(FOUR_BITS), GenerateConfig(num_seen=2))
    assert found.count == 1
    assert found.asked == [
        Asked("seen", "0011"), Asked("seen", "0101"), Asked("validation", "1000"), Asked("unseen", "0110"),
        Asked("unseen", "1111"),
    ]  # fmt: skip


def test_tasks_that_the_zoo_left_out_are_unseen_and_come_in_pairs(trained):
    known = {bits for side in SIDES.values() for bits in side}
    few, most = (default_request(trained(FOUR_BITS), GenerateConfig(num_others=n)).asked[len(known) :] for n in (2, 4))
    assert most[:2] == few
    assert {one.split for one in most} == {"unseen"}
    bits = [str(one.task_bits) for one in most]
    assert all(bits[i + 1] == complement(bits[i]) for i in range(0, 4, 2))
    strange = known | {complement(task) for task in known} | {"0000", "1111"}
    assert set(bits) == {format(code, "04b") for code in range(16)} - strange
    for wrong, why in ((6, "6 other tasks cannot be drawn: 4 classes have 4"), (3, "3 other tasks")):
        with pytest.raises(UsageError, match=why):
            default_request(trained(FOUR_BITS), GenerateConfig(num_others=wrong))


def test_a_task_that_is_asked_for_is_placed_on_its_side_of_the_split(trained):
    asked = [Asked(task_bits=bits) for bits in ("1110", "1000", "0110", "0000")]
    found = request_of(trained(FOUR_BITS), GenerateConfig(), asked, "list")
    assert [one.split for one in found.asked] == ["seen", "validation", "unseen", "unseen"]
    assert [one.task_bits for one in found.asked] == ["1110", "1000", "0110", "0000"]
    assert found.count == 1
    assert request_of(trained(LEVEL), GenerateConfig(), [Asked(accuracy=0.6)], "x").asked == [Asked(accuracy=0.6)]


def test_nothing_can_be_asked_of_an_unconditional_model(trained):
    with pytest.raises(UsageError, match="unconditional: nothing can be asked of it") as error:
        request_of(trained(None), GenerateConfig(), [Asked(task_bits="0110")], "0110")
    assert "--task-bits" in str(error.value)


def test_what_a_model_does_not_know_cannot_be_asked_of_it(trained):
    with pytest.raises(UsageError, match="knows no --accuracy"):
        request_of(trained(FOUR_BITS), GenerateConfig(), [Asked(accuracy=0.9)], "x")
    with pytest.raises(UsageError, match="lies in no level"):
        request_of(trained(LEVEL), GenerateConfig(), [Asked(accuracy=0.6), Asked(accuracy=0.8)], "x")


def test_different_requests_lie_in_different_folders():
    one = Request("0110", [Asked(task_bits="0110")], 1)
    five = Request("0110", one.asked, 5)
    configs = [GenerateConfig(), GenerateConfig(seed=1), GenerateConfig(num_steps=3), GenerateConfig(state="none")]
    names = [
        request_folder(request, config, method)
        for request in (one, five) for config in configs for method in ("rpg", "pdiff")
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert names[:2] == ["0110-s0-n1", "pdiff-0110-s0-n1"]
    assert request_folder(one, GenerateConfig(method="rpg"), "rpg") == names[0]  # saying what was clear changes nothing


def test_a_trivial_generator_has_a_folder_that_no_setting_of_denoising_changes():
    everything = Request("all", [Asked()], 20)
    configs = [GenerateConfig(), GenerateConfig(num_steps=3), GenerateConfig(state="none", temperature=0.5)]
    assert {request_folder(everything, config, "soup-16") for config in configs} == {"soup-16-all-s0-n20"}
    assert request_folder(everything, GenerateConfig(seed=1), "soup-16") == "soup-16-all-s1-n20"


def test_a_family_means_one_of_its_members_and_unknown_names_get_the_nearest():
    assert {short: GenerateConfig(method=short).method for short in SHORT} == SHORT
    assert all(GenerateConfig(method=name).method == name for name in METHODS)
    assert set(SHORT.values()) < set(METHODS) and not set(SHORT) & set(METHODS)
    with pytest.raises(ValidationError, match="unknown method 'sop-16'; did you mean 'soup-16'"):
        GenerateConfig(method="sop-16")
