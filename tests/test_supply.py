"""What the package asks of others: no network, nothing that runs code from data, dependencies with a lowest version."""

import ast
import re
import socket
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import rpgcli
from tests.network import ATTEMPTS

ROOT = Path(rpgcli.__file__).parent
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
REQUIREMENTS = [
    *PROJECT["project"]["dependencies"],
    *(r for extra in PROJECT["project"]["optional-dependencies"].values() for r in extra),
    *PROJECT["build-system"]["requires"],
]
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9-]+)>=(?P<least>[0-9]+(\.[0-9]+)*)")


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_every_dependency_has_a_lowest_version_that_is_met(requirement):
    if requirement.startswith("rpgcli["):
        return
    found = REQUIREMENT.fullmatch(requirement)
    assert found, f"{requirement} names no lowest version"
    try:
        installed = version(found["name"])
    except PackageNotFoundError:
        return
    numbers = [int(part) for part in re.findall(r"[0-9]+", installed)]
    assert numbers >= [int(part) for part in found["least"].split(".")]


@pytest.mark.parametrize(
    "address", [("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0)], ids=["an address", "an address of version 6"]
)
def test_tests_have_no_network(address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    for connect in ("connect", "connect_ex"):
        with socket.socket(family) as one, pytest.raises(OSError, match="no network"):
            getattr(one, connect)(address)
    with socket.socket(family, socket.SOCK_DGRAM) as one, pytest.raises(OSError, match="no network"):
        one.sendto(b"x", address)
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("example.com", 80))
    assert len(ATTEMPTS) == 4
    ATTEMPTS.clear()  # Else this test would fail for having tried.


def test_the_machine_itself_is_no_network():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    assert ATTEMPTS == []


FORBIDDEN = {"compile", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads",
             "pickle.Unpickler", "numpy.load", "np.load"}  # fmt: skip
"""Further ways to run what a file says; those that first come to mind are in test_imports_go_down.py."""
RESTRICTED = ("imports.py", "torch.load")
"""The one reader of pickles, and where it is."""


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_from_data_in_less_known_ways(path):
    assert FORBIDDEN.isdisjoint(ast.unparse(call.func) for call in calls(path))


def test_the_one_reader_of_pickles_is_the_restricted_one():
    (load,) = [call for call in calls(ROOT / RESTRICTED[0]) if ast.unparse(call.func) == RESTRICTED[1]]
    assert {k.arg: ast.unparse(k.value) for k in load.keywords}["weights_only"] == "True"


def test_processes_are_started_without_a_shell():
    for path in sorted(ROOT.rglob("*.py")):
        for call in calls(path):
            assert not any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in call.keywords), path
