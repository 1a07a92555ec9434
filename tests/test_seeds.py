"""The mean over training seeds, compared task by task."""

from tests.bench.seeds import summary

TASKS = {"100": 0.5, "011": 0.7, "010": 0.9, "101": 0.9}


def report(shift: float, **others: dict[str, float]) -> dict[str, object]:
    mine = {task: accuracy + shift for task, accuracy in TASKS.items()}
    return {"per_task": {"rpg unseen": mine, "rpg seen": {"111": 0.0}, **{f"{n} unseen": t for n, t in others.items()}}}


def test_seeds_are_averaged_before_tasks_are_paired():
    lines = summary([report(0.0, mlp=TASKS), report(0.02)])  # The second has no row of the perceptron.
    assert lines[0] == "rpg, mean of 2 seeds: 0.7600 on 4 unseen tasks"
    assert lines[1].split() == ["-", "mlp", "+1.00", "±", "0.00", "points", "(paired)"]
