"""Groups, paired comparisons and the verdict, against sums done by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rpgcli.evaluation.groups import Comparison, Group, by_pair, compare, standard_error, verdict
from rpgcli.evaluation.report import majority
from rpgcli.tasks import complement
from tests.helpers import tiny_problem

TASKS = ["0011", "1100", "0001", "1110", "0101", "1010"]


def group(name: str, accuracies: list[float], tasks: list[str] | None = None, kind: str = "baseline") -> Group:
    return Group(name, kind, "unseen", accuracies, TASKS[: len(accuracies)] if tasks is None else tasks, 0.5)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_the_standard_error_is_scipy_s(values):
    assert standard_error(values) == pytest.approx(float(stats.sem(values)), abs=1e-12)


def test_the_standard_error_of_one_value_is_not_known():
    assert standard_error([0.5]) == standard_error([]) == 0.0


def test_a_task_and_its_complement_are_one_observation():
    assert by_pair({"0011": 0.5, "1100": 0.7, "0001": 0.9}) == pytest.approx([0.6, 0.9])
    assert all(complement(complement(t)) == t != complement(t) for t in TASKS)
    row = group("x", [0.5, 0.7, 0.9, 0.9, 0.8, 0.6]).to_json()
    assert row["accuracy"] == {
        "mean": pytest.approx(4.4 / 6), "se": pytest.approx(np.std([0.6, 0.9, 0.7], ddof=1) / math.sqrt(3)),
        "min": 0.5, "max": 0.9,
    }  # fmt: skip
    assert (row["count"], row["name"], row["kind"], row["split"]) == (6, "x", "baseline", "unseen")


def test_several_networks_of_a_task_are_averaged_first():
    several = group("x", [0.2, 0.4, 0.9], ["0011", "0011", "0001"])
    assert several.by_task() == pytest.approx({"0011": 0.3, "0001": 0.9})
    assert several.mean == pytest.approx(0.5)  # over networks
    assert several.to_json()["accuracy"]["se"] == pytest.approx(0.3)  # over tasks: |0.9 - 0.3| / 2


def test_networks_without_tasks_count_one_by_one():
    loose = Group("x", "generated", "all", [0.5, 0.7], [None, None], None)
    assert loose.to_json()["accuracy"]["se"] == pytest.approx(0.1)
    assert Group("x", "generated", "all", [], [], None).to_json()["accuracy"] is None


def test_comparisons_are_paired_over_the_tasks_of_both():
    a = group("rpg", [0.9, 0.8, 0.7, 0.9, 1.0, 0.8])
    b = group("ridge", [0.8, 0.8, 0.7, 0.7, 0.9], TASKS[:5])
    found = compare(a, b)
    differences = [0.05, 0.1, 0.1]  # pairs (0.1, 0), (0, 0.2), and 0101 alone
    assert found.difference == pytest.approx(sum(differences) / 3)
    assert found.se == pytest.approx(np.std(differences, ddof=1) / math.sqrt(3))
    assert (found.name, found.against, found.num_pairs) == ("rpg", "ridge", 3)
    assert found.above
    assert found.to_json()["above"] is True


def test_a_single_network_or_task_has_no_error_and_so_is_never_better():
    one = group("rpg", [0.9])
    found = compare(one, group("ridge", [0.1]))
    assert not found.has_error
    assert not found.above
    assert found.difference == pytest.approx(0.8)
    sentence, beats, _ = verdict(one, None, [group("ridge", [0.1])])
    assert not beats
    assert sentence.endswith("(ridge, 0.1000), +80.00 points (paired), standard error unknown.")
    loose = Group("pdiff", "generated", "all", [0.9], [None], None)
    many = Group("noise", "baseline", "all", [0.1, 0.2], [None] * 2, None)
    assert not compare(loose, many).above
    assert compare(many, loose).has_error  # the average of all is one network, and the same each time
    assert verdict(loose, None, [many])[0].startswith("pdiff reaches 0.9000 on 1 network: no evidence")


def test_comparisons_without_tasks_add_the_errors():
    a = Group("rpg", "generated", "all", [0.9, 0.7], [None] * 2, None)
    b = Group("average", "baseline", "all", [0.5], [None], None)
    found = compare(a, b)
    assert [found.difference, found.se] == pytest.approx([0.3, 0.1])
    assert found.num_pairs == 1


def test_two_standard_errors_are_the_line():
    assert not Comparison("a", "b", 0.02, 0.01, 5).above
    assert Comparison("a", "b", 0.0201, 0.01, 5).above


TRAINED = group("trained", [0.98] * 6, kind="trained")
RPG = group("rpg", [0.96, 0.96, 0.95, 0.97, 0.96, 0.96], kind="generated")
WEAK = group("average", [0.5, 0.5, 0.5, 0.5, 0.5, 0.51])


def test_the_verdict_when_every_trivial_generator_is_beaten():
    ridge = group("ridge", [0.93, 0.93, 0.92, 0.94, 0.93, 0.94])
    sentence, beats, comparisons = verdict(RPG, TRAINED, [WEAK, ridge])
    assert beats
    assert sentence == (
        "rpg reaches 0.9600 on 6 unseen tasks, 2.00 points below trained networks (0.9800), "
        "and beats the strongest trivial generator (ridge, 0.9317) by +2.83 ± 0.17 points (paired), "
        "17.0 standard errors."
    )
    assert [c.against for c in comparisons] == ["average", "ridge"]
    assert [c.to_json()["comparable"] for c in comparisons] == [True, True]
    assert {c.why for c in comparisons} == {"asked for the same tasks"}


def test_the_verdict_compares_with_trained_networks_task_by_task():
    """Four of six tasks have a trained network; the generated networks of the other two are worse."""
    generated = group("rpg", [0.96, 0.96, 0.95, 0.97, 0.50, 0.50], kind="generated")
    trained = replace(TRAINED, accuracies=TRAINED.accuracies[:4], tasks=TRAINED.tasks[:4])
    assert (
        "0.8067 on 6 unseen tasks, 2.00 points below networks trained for 4 of them (0.9800)"
        in verdict(generated, trained, [WEAK])[0]
    )


def test_the_verdict_when_it_is_no_better():
    better = group("mlp", [0.97] * 6)
    sentence, beats, _ = verdict(RPG, None, [WEAK, better])
    assert not beats
    assert sentence == (
        "rpg reaches 0.9600 on 6 unseen tasks: no evidence that it is better than the strongest trivial generator "
        "(mlp, 0.9700), -1.00 ± 0.00 points (paired)."
    )


def test_the_verdict_names_the_generator_that_was_not_beaten():
    """The strongest is beaten clearly, a weaker one not: its differences scatter."""
    strongest = group("ridge", [a - 0.01 for a in RPG.accuracies])
    scattered = group("nearest", [0.99, 0.99, 0.60, 0.60, 0.98, 0.98])
    sentence, beats, _ = verdict(RPG, TRAINED, [strongest, scattered])
    assert not beats
    assert "no evidence that it is better than a trivial generator (nearest, 0.8567)" in sentence


def test_the_verdict_with_nothing_to_compare_or_to_judge():
    assert verdict(RPG, TRAINED, [])[0].endswith("nothing trivial to compare with.")
    sentence, beats, comparisons = verdict(group("rpg", [], []), TRAINED, [WEAK])
    assert "no network to be judged" in sentence
    assert not beats
    assert not comparisons
    assert not verdict(RPG, TRAINED, [group("ridge", [], [])])[1]


def loose(name: str, accuracies: list[float], kind: str = "baseline") -> Group:
    return Group(name, kind, "all", accuracies, [None] * len(accuracies), None)


PDIFF = loose("pdiff", [0.80, 0.82], "generated")
NOISE, SOUP, MEAN = loose("noise", [0.70, 0.72]), loose("soup", [0.90, 0.92]), loose("average", [0.95])
NEW, COPIES = (True, "as novel: ..."), (False, "less novel: ...")


def test_the_verdict_compares_with_generators_that_are_as_novel_and_names_those_that_are_not():
    comparable = {"noise": NEW, "soup": COPIES, "average": COPIES}
    sentence, beats, comparisons = verdict(PDIFF, None, [NOISE, SOUP, MEAN], comparable=comparable)
    assert beats
    assert sentence == (
        "pdiff reaches 0.8100 on 2 networks, and beats the strongest trivial generator that is as novel "
        "(noise, 0.7100) by +10.00 ± 1.41 points, 7.1 standard errors; more accurate but less novel: soup, average."
    )
    assert [(c.against, c.comparable, c.why) for c in comparisons] == [
        ("noise", True, "as novel: ..."), ("soup", False, "less novel: ..."), ("average", False, "less novel: ...")
    ]  # fmt: skip
    assert comparisons[1].to_json()["why"] == "less novel: ..."
    sentence, beats, _ = verdict(PDIFF, None, [NOISE, SOUP], comparable={"noise": NEW, "soup": NEW})
    assert not beats
    assert "no evidence that it is better than the strongest trivial generator (soup, 0.9100), -10.00" in sentence


def test_the_verdict_when_no_trivial_generator_is_as_novel():
    sentence, beats, _ = verdict(PDIFF, None, [NOISE, SOUP], comparable={"noise": COPIES, "soup": COPIES})
    assert not beats
    assert sentence.endswith(
        "no evidence that it is better, as no trivial generator is as novel; more accurate but less novel: soup."
    )


def test_the_verdict_names_a_few_of_the_more_accurate_ones():
    many = [loose(f"soup-{i}", [0.9, 0.9]) for i in range(5)]
    sentence, _, _ = verdict(PDIFF, None, [NOISE, *many], comparable={"noise": NEW, **{b.name: COPIES for b in many}})
    assert sentence.endswith("more accurate but less novel: soup-0, soup-1, soup-2 and 2 more.")


def test_the_verdict_says_what_the_set_is_and_what_would_do_as_well():
    trained = loose("trained", [0.81, 0.83], "trained")
    sentence, beats, comparisons = verdict(
        PDIFF, trained, [NOISE], what="all copies of training networks", instead="the training networks themselves"
    )
    assert not beats
    assert comparisons[0].above
    assert sentence == (
        "pdiff reaches 0.8100 on 2 networks (all copies of training networks), 1.00 points below trained networks "
        "(0.8200): no evidence that it is better than the training networks themselves."
    )


def test_the_verdict_counts_networks_that_failed():
    some = Group("pdiff", "generated", "all", [0.80, 0.82], [None] * 2, None, ["a.safetensors"])
    sentence, beats, _ = verdict(some, None, [NOISE], what="1 of them at chance")
    assert beats
    assert sentence.startswith(
        "pdiff reaches 0.8100 on 2 networks (1 of them at chance; 1 more failed: NaN or infinity)"
    )
    assert some.to_json()["failed"] == ["a.safetensors"]
    assert some.to_json()["count"] == 2
    none = Group("pdiff", "generated", "all", [], [], None, ["a", "b"])
    sentence, beats, comparisons = verdict(none, None, [NOISE])
    assert sentence == "all 2 networks of pdiff failed (NaN or infinity): no evidence that it is better."
    assert not beats
    assert not comparisons


def test_majority_guesses_the_more_frequent_answer_of_the_training_images():
    problem = tiny_problem(num=50)
    tasks = ["1111111000", "0000000111", "1000000000"]
    train, test = problem.dataset.train.labels, problem.dataset.test.labels
    expected = []
    for bits in tasks:
        inside = torch.tensor([int(b) for b in bits])
        guess = int(inside[train].float().mean() > 0.5)
        expected.append(float((inside[test] == guess).double().mean()))
    assert majority(problem, tasks) == pytest.approx(expected)
    assert expected[0] == expected[1]  # a task and its complement are one problem
