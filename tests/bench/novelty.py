"""Novel and performant networks from independent starts (N&P at m = 1), for variations of p-diff: `make novelty`.

Each variation is a run of its own: what it changes in the recipe `pdiff-digits-mlp3`, in the stage that reads it. What
counts is fixed before any generator runs: tau and alpha come from each variation's own zoo (`rpg evaluate`). Beside it
stands the trivial generator that does best.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPE = "pdiff-digits-mlp3"
VARIATIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "as in the recipe": {},
    "temperature 1.1": {"generate": ["generate.temperature=1.1"]},
    "temperature 1.2": {"generate": ["generate.temperature=1.2"]},
    "temperature 1.3": {"generate": ["generate.temperature=1.3"]},
    "2000 steps": {"train-diffusion": ["diffusion.training.num_steps=2000"]},
    "without alignment": {"tokenize": ["tokens.align=none"]},
    "convolutional autoencoder": {
        "train-ae": ["autoencoder.network={kind: conv}"], "train-diffusion": ["diffusion.training.num_steps=2000"]
    },
    "600 networks": {"collect": ["collect.num_networks=600"]},
    "asked for 0.97": {"train-diffusion": ["diffusion.condition=accuracy"], "generate": ["--accuracy", "0.97"]},
}  # fmt: skip
"""Name -> stage -> settings, or options of the command."""


def rpg(*arguments: object) -> dict[str, Any]:
    """Run a command; what it says on stdout."""
    command = [sys.executable, "-m", "rpgcli", *map(str, arguments), "--resume", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(folder: Path, zoo: Path, changes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """All stages of a variation, on the recipe's zoo unless it changes that; its report."""
    of_zoo: list[object] = ["--zoo", zoo]
    if "collect" in changes:
        of_zoo = []
        rpg("collect", RECIPE, *settings(changes["collect"]), "--run", folder)
    recipe = [] if (folder / "recipe.json").exists() else [RECIPE]
    rpg("tokenize", *recipe, *settings(changes.get("tokenize", ())), "--run", folder, *of_zoo)
    rpg("train-ae", *settings(changes.get("train-ae", ())), "--run", folder)
    # Whatever comes of it is reported.
    rpg("train-diffusion", "--allow-bad", *settings(changes.get("train-diffusion", ())), "--run", folder)
    made = rpg("generate", *settings(changes.get("generate", ())), "--run", folder)
    rpg("evaluate", "--request", Path(made["path"]).name, "--run", folder, *of_zoo)
    found: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return found


def settings(given: Sequence[str]) -> list[str]:
    """Settings of the recipe as options; options as they are."""
    return [part for one in given for part in (["--set", one] if "=" in one else [one])]


def share(group: Mapping[str, Any]) -> tuple[float, float]:
    """N&P at m = 1 with its standard error; 0 where a group has no profile."""
    first = next((entry for entry in group.get("np", []) if entry["m"] == 1), {"share": 0.0, "se": 0.0})
    return first["share"], first["se"]


def line(name: str, report: Mapping[str, Any]) -> str:
    """One row: the generator, and the strongest trivial generator at m = 1."""
    groups = [g for g in report["groups"] if g["accuracy"] and g["kind"] != "trained"]
    learned = next(g for g in groups if g["kind"] == "generated")
    trivial = max((g for g in groups if g["kind"] == "baseline"), key=lambda g: share(g)[0])
    cells = []
    for group in (learned, trivial):
        value, se = share(group)
        distance = group["distance"].get("in_tau")
        cells.append(f"{value:.2f} ± {se:.2f} (accuracy {group['accuracy']['mean']:.3f}, {distance:.2f} tau)")
    return f"{name:34} {cells[0]:42} {trivial['name']:14} {cells[1]}"


def main() -> None:
    """Run every variation and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/novelty"))
    out = parser.parse_args().out
    lines = [f"{'p-diff on ' + RECIPE:34} {'N&P at m = 1':42} strongest trivial generator"]
    rpg("collect", RECIPE, "--run", out)
    for name, changes in VARIATIONS.items():
        folder = out / "".join(c if c.isalnum() or c == "." else "-" for c in name).lower()
        lines.append(line(name, run(folder, out / "zoo", changes)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
