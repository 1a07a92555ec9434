"""Several training seeds of one generator on one zoo, as one result: `python -m tests.bench.seeds REPORT...`.

Accuracies of a task are averaged over the seeds first; then comparisons are paired over unseen tasks as in each report.
A trivial generator does not depend on the generator's seed: it is taken from the first report that has it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rpgcli.evaluation.groups import Group, compare


def group(name: str, by_task: dict[str, float]) -> Group:
    """A group with one accuracy for each task."""
    return Group(name, "", "unseen", list(by_task.values()), list(by_task), None)


def summary(reports: list[dict[str, Any]]) -> list[str]:
    """Lines that say how the generator does."""
    rows = [
        {name.removesuffix(" unseen"): t for name, t in r["per_task"].items() if name.endswith(" unseen")}
        for r in reports
    ]
    others: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, tasks in row.items():
            others.setdefault(name, tasks)
    tasks = others.pop("rpg")
    mean = group("rpg", {task: sum(row["rpg"][task] for row in rows) / len(rows) for task in tasks})
    lines = [f"rpg, mean of {len(rows)} seeds: {mean.mean:.4f} on {len(tasks)} unseen tasks"]
    for name, by_task in others.items():
        found = compare(mean, group(name, by_task))
        lines.append(f"  - {name:12} {100 * found.difference:+6.2f} ± {100 * found.se:.2f} points (paired)")
    return lines


if __name__ == "__main__":
    print("\n".join(summary([json.loads(Path(path).read_text()) for path in sys.argv[1:]])))
