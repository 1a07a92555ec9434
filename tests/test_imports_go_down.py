"""The layers of the package: a module imports only what lies beside or below it, and some things only one may touch."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rpgcli

ROOT = Path(rpgcli.__file__).parent
LAYERS = [
    {"__main__"},
    {"cli"},
    {"command"},
    {"console"},
    {"foreign"},
    {"pipeline", "planning", "diagnosis"},
    {"recipe"},
    {"models"},
    {"methods", "training", "collection", "generation", "evaluation"},
    {"subsets"},
    {
        "problem",
        "zoo",
        "imports",
        "targets",
        "tasks",
        "cores",
        "denoisers",
        "diffusion",
        "samplers",
        "conditions",
        "autoencoder",
    },
    {"positions", "kernels"},
    {
        "layout",
        "alignment",
        "tokens",
        "artifact",
        "rng",
        "strict_yaml",
        "progress",
        "sharding",
        "config",
        "errors",
        "ranks",
        "__init__",
    },
]
"""From the top down; the parts of a folder count as one."""
ONLY: dict[str, set[str]] = {
    "rich": {"console"}, "typer": {"cli", "command"}, "mamba_ssm": {"kernels"}, "causal_conv1d": {"kernels"},
    "ray": {"sharding"},
    "pickle": {"imports"},  # for the name of the error that `torch.load(weights_only=True)` raises
    "dill": set(), "marshal": set(), "shelve": set(), "joblib": set(),
}  # fmt: skip
"""Packages that only these modules may import."""
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.save", "yaml.load", "__import__"}


def unit(path: Path) -> str:
    """`cores` for rpgcli/cores/lstm.py, `cli` for rpgcli/cli.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


MODULES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
KNOWN = {unit(path) for path in MODULES}


def imported(tree: ast.AST) -> set[str]:
    """Full names that a module imports, also inside functions and through `importlib.import_module`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "_import_error")):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return names


def parts_of_rpg(tree: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imported(tree) if name.startswith("rpgcli.")} & KNOWN


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    level = next(i for i, layer in enumerate(LAYERS) if unit(path) in layer)
    allowed = set().union(*LAYERS[level:])
    assert parts_of_rpg(MODULES[path]) <= allowed
    roots = {name.partition(".")[0] for name in imported(MODULES[path])}
    assert {package for package, users in ONLY.items() if unit(path) not in users} & roots == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_from_data(path):
    calls = {ast.unparse(node.func) for node in ast.walk(MODULES[path]) if isinstance(node, ast.Call)}
    assert calls & (CALLS if unit(path) == "imports" else CALLS | {"torch.load"}) == set()


def test_no_two_units_import_each_other():
    graph: dict[str, set[str]] = {}
    for path, tree in MODULES.items():
        graph.setdefault(unit(path), set()).update(parts_of_rpg(tree) - {unit(path)})
    assert set(TopologicalSorter(graph).static_order()) == KNOWN
