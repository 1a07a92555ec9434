"""Fuzzing of whatever reads a file from a stranger: `python -m tests.torture.fuzz TARGET FOLDER SECONDS`.

Guided by coverage where atheris is installed. The tests drive the same targets with hypothesis.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType

from hypothesis import strategies as st

from rpgcli import strict_yaml
from rpgcli.artifact import MANIFEST, canonical
from rpgcli.errors import RpgError
from rpgcli.recipe import Recipe, read_stored
from tests.conftest import run_rpg
from tests.torture.hostile import entry, manifest, tensors

GUIDING = ("rpgcli.artifact", "rpgcli.strict_yaml", "rpgcli.recipe", "rpgcli.cli", "rpgcli.console", "yaml.")
"""The modules whose branches guide atheris."""
Target = Callable[[bytes, Path], None]


def command(*arguments: object) -> None:
    """Run `rpg`, which may end with any code but that of a fault of ours."""
    outcome = run_rpg(*arguments)
    assert outcome.code in range(5), outcome
    text = (outcome.out + outcome.err).replace("\n", "")
    assert text.isprintable() and "internal error" not in text, outcome


def inspect_tensors(data: bytes, folder: Path) -> None:
    """`rpg inspect FILE`."""
    path = folder / "a.safetensors"
    path.write_bytes(data)
    command("inspect", path)


def inspect_and_verify(data: bytes, folder: Path) -> None:
    """`rpg inspect` and `rpg verify` of an artifact with this manifest and one file."""
    (folder / "a.json").write_bytes(b"{}\n")
    (folder / MANIFEST).write_bytes(data)
    command("inspect", folder)
    command("verify", folder)


def recipe(data: bytes, folder: Path) -> None:
    """A recipe file."""
    try:
        strict_yaml.validate(strict_yaml.parse(data, "x.yaml"), Recipe)
    except RpgError as error:
        assert str(error).replace("\n", "").isprintable(), error


def stored_recipe(data: bytes, folder: Path) -> None:
    """The recipe that a run holds."""
    (folder / "recipe.json").write_bytes(data)
    try:
        read_stored(folder / "recipe.json")
    except RpgError:
        return


TARGETS: dict[str, Target] = {f.__name__: f for f in (inspect_tensors, inspect_and_verify, recipe, stored_recipe)}

GOOD: Mapping[str, list[bytes]] = {
    "inspect_tensors": [
        tensors({"a": entry((1,), 0, 4), "b": entry((2, 1), 4, 8, "F16"), "__metadata__": {"rpg": "null"}}, bytes(8))
    ],
    "inspect_and_verify": [
        manifest(facts={"networks": [{"file": "a.json"}], "n": 1.5}, volatile={"seconds": 1.0}),
        manifest(files={"a.json": {"size": 3, "sha256": "0" * 64}}, section={"collect": {"kind": "tasks"}}),
    ],
    "recipe": [
        b"name: x\ncollect: {kind: tasks, num_seen: 8}\nrpg:\n  core: {kind: mamba2, d_model: 64}\n"
        b"  selection: {samplers: [{kind: ddim, eta: 0.5}], num_steps: [2]}\ntarget: {kind: mlp3, hidden: [8]}\n",
        b"a: &x [1, -2.5, .nan, 'x', \"\\e\", ~, true, 0x1F, !!int 3]\nb: *x # comment\n? c\n: |\n  text\n",
    ],
    "stored_recipe": [canonical(Recipe().to_json())],
}
"""Files to begin with."""


def mutations(target: str) -> st.SearchStrategy[bytes]:
    """Good files in which a few pieces are cut out, repeated, or replaced; and nonsense."""
    pieces = st.sampled_from(
        [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"-", b"1e999", b"NaN", b"null", b"\x1b"]
    )
    edit = st.tuples(st.integers(0, 10**4), st.integers(0, 12), st.integers(0, 3), pieces | st.binary(max_size=12))

    def apply(good: bytes, edits: list[tuple[int, int, int, bytes]]) -> bytes:
        for at, length, repeats, new in edits:
            at %= len(good) + 1
            good = good[:at] + new * repeats + good[at + length :]
        return good

    return st.builds(apply, st.sampled_from(GOOD[target]), st.lists(edit, min_size=1, max_size=6)) | st.binary(
        max_size=200
    )


def main(target: str, folder: Path, seconds: str) -> None:
    """Let atheris look for a file that ends in anything but our own errors; it ends the process with a report then."""
    import atheris

    begin = folder / "begin"
    begin.mkdir(parents=True)
    for i, good in enumerate(GOOD[target]):
        (begin / str(i)).write_bytes(good)
    run = TARGETS[target]
    for module in [m for name, m in sys.modules.items() if name.startswith(GUIDING)]:
        things = list(vars(module).values())
        things += [method for thing in things if isinstance(thing, type) for method in vars(thing).values()]
        for thing in things:
            if isinstance(thing, FunctionType) and thing.__module__ == module.__name__:
                atheris.instrument_func(thing)
    words = [sys.argv[0], str(begin), f"-max_total_time={seconds}", "-max_len=4096", "-timeout=5", "-rss_limit_mb=2048"]
    atheris.Setup([*words, f"-artifact_prefix={folder}{os.sep}"], lambda data: run(data, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
