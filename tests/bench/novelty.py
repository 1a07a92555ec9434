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
PCA = {"train-ae": ["autoencoder.network.kind=pca", "autoencoder.network.latent_dim=128"]}
SHORT = ["diffusion.training.num_steps=500"]
ACCURATE = ["diffusion.condition=accuracy", *SHORT]

VARIATIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "as in the recipe": {},
    "without alignment": {"tokenize": ["tokens.align=none"]},
    "PCA": PCA,
    "PCA, 500 steps": {**PCA, "train-diffusion": SHORT},
    "PCA, 500 steps, temperature 1.1": {**PCA, "train-diffusion": SHORT, "generate": ["generate.temperature=1.1"]},
    "PCA, 500 steps, temperature 1.2": {**PCA, "train-diffusion": SHORT, "generate": ["generate.temperature=1.2"]},
    "PCA, 500 steps, 600 networks": {"collect": ["collect.num_networks=600"], **PCA, "train-diffusion": SHORT},
    "PCA, 500 steps, asked for 0.97": {**PCA, "train-diffusion": ACCURATE, "generate": ["--accuracy", "0.97"]},
}
"""Name -> stage -> settings, or options of the command."""


def run(folder: Path, changes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """All stages of a variation; its report."""
    rpg = [sys.executable, "-m", "rpgcli"]
    generated: list[str] = []
    for stage in ("collect", "tokenize", "train-ae", "train-diffusion", "generate", "evaluate"):
        given = list(changes.get(stage, []))
        options = [part for g in given for part in (["--set", g] if "=" in g else [g])]
        if stage == "collect":
            options.insert(0, RECIPE)
        if stage == "train-diffusion":
            options.append("--allow-bad")  # Whatever comes of it is reported.
        made = [*rpg, stage, *options, *(generated if stage == "evaluate" else []), "--run", str(folder), "--resume"]
        done = subprocess.run([*made, "--json"], check=True, stdout=subprocess.PIPE)
        if stage == "generate":
            generated = ["--request", Path(json.loads(done.stdout)["path"]).name]
    found: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return found


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
    for name, changes in VARIATIONS.items():
        folder = out / "".join(c if c.isalnum() or c == "." else "-" for c in name).lower()
        lines.append(line(name, run(folder, changes)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
