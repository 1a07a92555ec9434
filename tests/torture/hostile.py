"""Files that a stranger may send, and what they are shown to."""

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rpgcli import artifact
from rpgcli.artifact import BEGUN, MANIFEST, canonical, digest
from rpgcli.errors import RpgError
from rpgcli.imports import read_network
from rpgcli.recipe import load, read_stored
from rpgcli.training import CHECKPOINT, METRICS
from tests.conftest import run_rpg

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m\u202egnp\r\n"
"""Would set a terminal's title, clear it, colour it, turn text around and forge a line."""
Build = Callable[[Path], object]


# --- safetensors ------------------------------------------------------------------------------------------------------


def entry(shape: object = (1,), begin: int = 0, end: int = 4, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors(header: object, data: bytes = bytes(4), size: int | None = None) -> bytes:
    """A safetensors file with this header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def bad_tensors() -> dict[str, bytes]:
    """Safetensors files."""
    return {
        "nothing": b"",
        "half a length": b"\1\2\3",
        "a header of 2**63 bytes": tensors({}, size=2**63),
        "a header of 2**64 - 1 bytes": tensors({}, size=2**64 - 1),
        "a header longer than the file": tensors({}, size=1000),
        "a header of 2 MiB": tensors(b" " * (2 << 20) + b"{}"),
        "a header of nothing but spaces": tensors(b" " * (1 << 20)),
        "a header that is no JSON": tensors(b"\x80\x04cposix\nsystem\n"),
        "a header that is a list": tensors([]),
        "a header nested a million times": tensors(b"[" * (1 << 20)),
        "a header nested in objects": tensors(b'{"a":' * 100_000),
        "200,000 tensors": tensors({str(i): entry([0], 0, 0) for i in range(200_000)}, b""),
        "15,000 tensors": tensors({str(i): entry([0], 0, 0) for i in range(15_000)}, b""),
        "overlapping tensors": tensors({"a": entry((2,), 0, 8), "b": entry((2,), 4, 12)}, bytes(12)),
        "a hole between tensors": tensors({"a": entry((1,), 0, 4), "b": entry((1,), 8, 12)}, bytes(12)),
        "data beyond the end": tensors({"a": entry((2,), 0, 8)}),
        "data that end before they begin": tensors({"a": entry((1,), 4, 0)}),
        "data of another size": tensors({"a": entry((3,), 0, 4)}),
        "negative offsets": tensors({"a": entry((1,), -4, 0)}),
        "an endless offset": tensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e400]}}'),
        "a shape that overflows": tensors({"a": entry((2**63 - 1, 2**63 - 1, 4), 0, 4)}),
        "a negative shape": tensors({"a": entry((-1, -1), 0, 4)}),
        "a shape of 10,000 dimensions": tensors({"a": entry([1] * 10_000, 0, 4)}),
        "an unknown dtype": tensors({"a": entry(dtype="F31")}),
        "a dtype that torch lacks": tensors({"a": entry((4,), 0, 3, "F6_E2M3")}, bytes(3)),
        "one name twice": tensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        "escapes in a name": tensors({ESCAPES: entry()}),
        "a name out of the folder": tensors({"../../../../tmp/owned": entry()}),
        "a name of 500 KiB": tensors({"x" * (500 << 10): entry((1,), 0, 4), "y" * (400 << 10): entry((0,), 4, 4)}),
        "metadata that are no text": tensors({"__metadata__": {"a": [1, {"b": 2}]}, "a": entry()}),
        "metadata of 900 KiB": tensors({"__metadata__": {"rpg": "\x1b[2J" * 90_000}, "a": entry()}),
        "data after the last tensor": tensors({"a": entry()}, bytes(1000)),
        "a header that is not UTF-8": tensors(b'{"\xff\xfe":' + json.dumps(entry()).encode() + b"}"),
        "NaN": tensors({"a": entry((2,), 0, 8)}, b"\xff" * 8),
    }


# --- manifests --------------------------------------------------------------------------------------------------------


def manifest(identified: bool = True, **changes: Any) -> bytes:
    """A manifest without files and with these changes; its id is right unless the change is to the id."""
    value = {
        "schema": 1, "stage": "collect", "key": "0" * 64, "section": {}, "inputs": {}, "files": {}, "facts": {},
        "volatile": {}, **changes,
    }  # fmt: skip
    if identified and "id" not in value["volatile"]:
        value["volatile"]["id"] = digest({name: v for name, v in value.items() if name != "volatile"})
    return canonical(value)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


RECORD = {"size": 1, "sha256": "0" * 64}
NAMES = ["../x", "/etc/passwd", "a/../../b", "a\\..\\b", ESCAPES, "a\0b", "", ".", "..", "-rf", "~", "con\u202egpj"]


def bad_manifests() -> dict[str, bytes]:
    """Manifests."""
    return {
        "an empty manifest": b"",
        "a manifest that is no JSON": b"\x80\x04cposix\nsystem\n",
        "a manifest that is a list": b"[]",
        "a manifest of 33 MiB": manifest(facts={"a": "x" * (33 << 20)}),
        "a manifest of 32 MiB in one emoji and one text": manifest(facts={"\U0001f600": "x" * (31 << 20)}),
        "a manifest of lists": b'{"schema":1,"facts":[' + b"[]," * 365_000 + b"[]]}",
        "a manifest of objects": b'{"schema":1,"facts":[' + b'{"":0},' * 365_000 + b"{}]}",
        "a whole manifest of objects": manifest(facts={"a": [{"": 0}] * 365_000}),
        "a manifest of numbers": manifest(facts={"a": [0] * 740_000}),
        "a manifest of 10 million lists": b"[" + b"[]," * 10_000_000 + b"[]]",
        "a manifest nested 90 times": manifest(facts={"a": nested(90)}),
        "a manifest nested 300 times": manifest(facts={"a": nested(300)}, identified=True),
        "a manifest nested 900 times": manifest(facts={"a": nested(900)}),
        "a manifest nested a million times": b'{"a":' * 1_000_000,
        "one key twice": manifest()[:-1] + b',"facts":{"networks":[]}}',
        "a key that only looks the same": manifest().replace(b'"facts"', b'"f\\u0061cts"', 1)[:-1] + b',"facts":{}}',
        "NaN": manifest().replace(b'"facts":{}', b'"facts":{"a":NaN}'),
        "a number that overflows": manifest().replace(b'"facts":{}', b'"facts":{"a":1e999}'),
        "a number of 4,000 digits": manifest(facts={"a": 10**4000}),
        "a number of 5,000 digits": manifest().replace(b'"facts":{}', b'"facts":{"a":' + b"9" * 5000 + b"}"),
        "a lone surrogate": manifest().replace(b'"facts":{}', b'"facts":{"a":"\\ud800"}'),
        "UTF-16": manifest().decode().encode("utf-16"),
        "not UTF-8": manifest().replace(b'"facts":{}', b'"facts":{"\xff":0}'),
        "a size of 4,000 digits": manifest(files={"a.bin": {"size": 10**4000, "sha256": "0" * 64}}),
        "a negative size": manifest(files={"a.bin": {"size": -1, "sha256": "0" * 64}}),
        "a hash that is no hash": manifest(files={"a.bin": {"size": 1, "sha256": ESCAPES}}),
        "escapes in the stage": manifest(stage=ESCAPES),
        "escapes in every text": manifest(facts={ESCAPES: ESCAPES, "a": ESCAPES}, section={ESCAPES: ESCAPES}),
        "a fact of 20 MiB": manifest(facts={"a": "x" * (20 << 20)}),
        "50,000 facts": manifest(facts={str(i): i for i in range(50_000)}),
        "50,000 missing files": manifest(files={f"{i}.bin": RECORD for i in range(50_000)}),
        "a schema of tomorrow": manifest(schema=2),
        "a schema of 4,000 digits": manifest(schema=10**4000),
        "a schema that is a text": manifest(schema="1"),
        "an id that is a list": manifest(volatile={"id": [1]}),
        "files that are a list": manifest(volatile={"files": [1], "id": "0"}),
        "files that are numbers": manifest(files={"a.bin": 1}),
        "a file twice": manifest(files={"a.bin": RECORD}, volatile={"files": {"a.bin": RECORD}}),
        **{f"a file called {name!r}": manifest(files={name: RECORD}) for name in NAMES},
        **{f"a varying file called {name!r}": manifest(volatile={"files": {name: RECORD}}) for name in NAMES},
    }


# --- recipes ----------------------------------------------------------------------------------------------------------


def bad_recipes() -> dict[str, bytes]:
    """Recipes."""
    return {
        "an alias bomb": b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)),
        "an alias of itself": b"a: &a [*a]",
        "flow nesting": b"a: " + b"[" * 500_000,
        "block nesting": b"".join(b" " * i + b"a:\n" for i in range(1000)),
        "list nesting": b"- " * 500_000,
        "a million values": b"a: [" + b"1," * 500_000 + b"]",
        "5,000 unknown keys": b"".join(b"key%d: 1\n" % i for i in range(4900)),
        "5,000 unknown keys below": b"rpg: {training: {" + b"".join(b"key%d: 1," % i for i in range(4900)) + b"}}",
        "4,000 wrong samplers": b"rpg: {selection: {samplers: [" + b"{kind: dim}," * 2400 + b"]}}",
        "a key of 1 MiB": b"x" * ((1 << 20) - 10) + b": 1",
        "a text of 1 MiB": b"name: " + b"x" * ((1 << 20) - 10),
        "2 MiB": b"#" * (2 << 20),
        "a tag that runs code": b"!!python/object/apply:os.system ['touch owned']",
        "a tag below": b"name: !!python/name:os.system ''",
        "one key twice": b"seed: 1\nseed: 2",
        "a merge key": b"a: &x {b: 1}\n<<: *x",
        "a second document": b"seed: 1\n---\nseed: 2",
        "escapes": ESCAPES.encode(),
        "escapes in quotes": b'name: "\\e[2J\\x07"',
        "escapes in a key": b'"\\e[2J": 1',
        "binary": bytes(range(256)),
        "UTF-16": "seed: 1".encode("utf-16"),
        "NUL": b"seed: 1\0",
        "a number of 100,000 digits": b"seed: " + b"9" * 100_000,
        "a hexadecimal number of 100,000 digits": b"seed: 0x" + b"f" * 100_000,
        "a name out of the folder": b"name: ../../etc/passwd",
        "an architecture out of the folder": b"target: {kind: timm, name: ../../etc/passwd}",
        "NaN": b"rpg: {training: {learning_rate: .nan}}",
        "infinity": b"rpg: {training: {learning_rate: .inf}}",
        "a percent directive": b"%YAML 99999999999999999999.1\n--- {}",
        "a code point that is none": b'name: "\\UFFFFFFFF"',
    }


def bad_stored_recipes() -> dict[str, bytes]:
    """Recipes of a run."""
    return {
        "a stored recipe that is a list": b"[]",
        "a stored recipe that is no JSON": b"seed: 1",
        "a stored recipe with 20,000 unknown keys": json.dumps({f"k{i}": 0 for i in range(20_000)}).encode(),
        "a stored recipe of 2 MiB": json.dumps({"name": "x" * (2 << 20)}).encode(),
        "a stored recipe nested 90 times": json.dumps({"rpg": nested(90)}).encode(),
        "a stored recipe nested 1,000 times": json.dumps({"rpg": nested(900)}).encode(),
        "a stored recipe with escapes": json.dumps({ESCAPES: ESCAPES, "name": ESCAPES}).encode(),
        "a stored recipe with one key twice": b'{"seed":1,"seed":2}',
    }


# --- runs -------------------------------------------------------------------------------------------------------------


def instead(name: str, make: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
    """Put something in place of a file of the run; `make` is told the place and a folder outside."""

    def change(run: Path, outside: Path) -> None:
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        make(path, outside)

    return change


def symlink(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "diary")


def hard_link(path: Path, outside: Path) -> None:
    os.link(outside / "diary", path)


def folder_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def write(content: bytes) -> Callable[[Path, Path], object]:
    return lambda path, outside: path.write_bytes(content)


RESUMED: dict[str, Callable[[Path, Path], object]] = {
    "metrics that are no JSON": instead(f"rpg.partial/{METRICS}", write(b"\x80\x04cposix\n")),
    "metrics that are numbers": instead(f"rpg.partial/{METRICS}", write(b"1\n2\n")),
    "metrics without steps": instead(f"rpg.partial/{METRICS}", write(b'{"a":1}\n')),
    "metrics with steps that are texts": instead(f"rpg.partial/{METRICS}", write(b'{"step":"1"}\n')),
    "metrics nested 100,000 times": instead(f"rpg.partial/{METRICS}", write(b'{"step":' + b"[" * 100_000 + b"\n")),
    "metrics of escapes": instead(f"rpg.partial/{METRICS}", write(ESCAPES.encode())),
    "metrics that are a link": instead(f"rpg.partial/{METRICS}", symlink),
    "a checkpoint of nothing": instead(f"rpg.partial/{CHECKPOINT}", write(b"")),
    "a checkpoint without a step": instead(f"rpg.partial/{CHECKPOINT}", write(tensors({"model.a": entry()}))),
    "a checkpoint of other parts": instead(f"rpg.partial/{CHECKPOINT}", write(tensors({"a.b.c": entry()}))),
    "a checkpoint that is a link": instead(f"rpg.partial/{CHECKPOINT}", symlink),
    "a checkpoint that is a folder": instead(f"rpg.partial/{CHECKPOINT}", lambda path, outside: path.mkdir()),
    "a temporary file that is a link": instead(f"rpg.partial/{CHECKPOINT}.tmp", symlink),
    "a temporary file that is a hard link": instead(f"rpg.partial/{METRICS}.tmp", hard_link),
    "a temporary manifest that is a link": instead(f"rpg.partial/{MANIFEST}.tmp", symlink),
    "a model that is a hard link": instead("rpg.partial/model.safetensors", hard_link),
    "a model that is a link": instead("rpg.partial/model.safetensors", symlink),
    "a lock that is a link": instead(".rpg.lock", symlink),
    "a lock that is a hard link": instead(".rpg.lock", hard_link),
    "a lock that is a pipe": instead(".rpg.lock", pipe),
    "an unfinished folder that is a link": instead("rpg.partial", folder_link),
    "an older artifact that is a link": instead(".rpg.old", folder_link),
    "a beginning that is no JSON": instead(f"rpg.partial/{BEGUN}", write(b"[" * 100_000)),
    "a beginning that is a link": instead(f"rpg.partial/{BEGUN}", symlink),
    "a folder among the files": instead("rpg.partial/folder", lambda path, outside: path.mkdir()),
    "a link to a folder among the files": instead("rpg.partial/folder", folder_link),
    "a file of the input that is a link": instead("tokens/statistics.safetensors", symlink),
    "a file of the input that is a pipe": instead("tokens/layout.json", pipe),
    "a recipe that is a link": instead("recipe.json", symlink),
}
"""Changes to a run in which `train-rpg` was interrupted."""


# --- what they are shown to -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """How a command or function took a file."""

    ended: str
    """`exit 3`, the class of our error, `ok`, or `crash: ...` with anything else that was raised."""
    text: str
    """What it wrote on both streams or said."""
    seconds: float
    """Of the processor."""
    mib: float
    """How much memory grew meanwhile."""


FUNCTIONS: Mapping[str, Callable[[Path], object]] = {
    "read_tensors": artifact.read_tensors, "read_network": read_network, "read_manifest": artifact.read_manifest,
    "recipe": lambda path: load(str(path)), "stored recipe": read_stored,
}  # fmt: skip


def peak_mib() -> float:
    """Largest memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def see(command: list[str]) -> Seen:
    """Show a file to one of FUNCTIONS (`command` is its name and the path), or run `rpg`."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before, begun = peak_mib(), time.process_time()
    text = ""
    try:
        if command[0] in FUNCTIONS:
            FUNCTIONS[command[0]](Path(command[1]))
            ended = "ok"
        else:
            outcome = run_rpg(*command)
            ended, text = f"exit {outcome.code}", outcome.out + outcome.err
    except RpgError as error:
        ended = type(error).__name__
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
        ended = f"crash: {type(error).__name__}: {error}"[:500]
    return Seen(ended, text, time.process_time() - begun, peak_mib() - before)


def see_all(commands: list[list[str]]) -> list[Seen]:
    """`see` each."""
    torch.set_num_threads(1)
    io.StringIO().write("")
    see([*commands[0]])  # Whatever is imported or cached by the first one.
    return [see(command) for command in commands]
