"""Artifacts: folders that are either whole and hashed, or not there.

Commit protocol, the only writer of artifacts:

    lock (flock)  ->  NAME.partial/ beside the target  ->  write, fsync, hash each file  ->  manifest.json, fsync
                  ->  rename  ->  fsync the parent

A reader sees the old artifact or the new one. A process killed at any point loses at most the unfinished stage, and a
stage that marked its partial folder as resumable goes on from there.

    key   sha256 of what determines the content: stage, schema, recipe section, ids of the inputs
    id    sha256 of the canonical manifest without `volatile` (seconds, host, versions, device, threads); written into
          `volatile` as well, so that damage to the manifest itself is found
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rpgcli.config import Config
from rpgcli.errors import ArtifactError, LockedError, OutputError, RpgError, UsageError

Item = TypeVar("Item")
Found = TypeVar("Found")

SCHEMA = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"
"""Names the key of an unfinished artifact; gone once it is committed."""
MAX_JSON_BYTES = 32 * 2**20
"""No JSON file of ours is larger; a larger one is refused unread. A network in a zoo takes 350 bytes, 17 values."""
MAX_JSON_VALUES = 750_000
"""Nor does any hold more values and brackets, so that reading one takes less than two seconds and 500 MiB."""
MAX_PROBLEMS = 1000
"""`verify` stops looking after so many."""
MAX_HEADER_BYTES = 2**20
"""The header of a safetensors file with some 10,000 tensors; a larger one is refused unread."""
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
"""What safetensors calls them, the order that it keeps them in reversed."""
STAGE = re.compile(r"[a-z][a-z-]{0,30}( --shard)?")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
"""Names of files in an artifact: no folders, no dots at either end, nothing a shell or terminal could trip over."""


class FileRecord(Config):
    """Size in bytes and content hash of one file."""

    size: int = Field(ge=0, lt=2**63)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Config):
    """What an artifact is, what it was made from, and what it holds; written last."""

    schema_version: int = Field(alias="schema")
    stage: str = Field(pattern=f"^{STAGE.pattern}$")
    key: str
    section: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileRecord]
    facts: dict[str, Any]
    volatile: dict[str, Any]

    def all_files(self) -> dict[str, FileRecord]:
        """The files, those that vary from run to run included; these are outside the id but checked as well."""
        varying = self.volatile.get("files", {})
        try:
            more = {name: FileRecord.model_validate(record) for name, record in varying.items()}
        except (AttributeError, ValidationError):
            raise ArtifactError("volatile.files of a manifest is damaged.", "Make the artifact anew.") from None
        if twice := sorted(self.files.keys() & more.keys()):  # Outside the id: it must not replace a hash inside it.
            raise ArtifactError(f"a manifest lists {twice[0]!r} twice.", "Do not trust this folder.")
        return self.files | more

    def identity(self) -> str:
        """The artifact's id: 64 hex digits."""
        return digest(self.model_dump(by_alias=True, exclude={"volatile"}))


def canonical(value: object) -> bytes:
    """The one JSON text of `value`: sorted keys, no spaces, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: object) -> str:
    """sha256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A committed artifact. Each file is hashed before its first use."""

    path: Path
    manifest: Manifest
    made_now: bool = False
    """Whether this process committed it; otherwise it was there."""
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def id(self) -> str:
        """64 hex digits, equal for equal content."""
        return self.manifest.identity()

    @cached_property
    def facts(self) -> "Facts":
        """What the stage found out: counts, accuracies, choices."""
        return Facts(self)

    @property
    def section(self) -> dict[str, Any]:
        """The resolved recipe section that made it."""
        return self.manifest.section

    @cached_property
    def records(self) -> dict[str, FileRecord]:
        """Size and hash of every file."""
        return self.manifest.all_files()

    def file(self, name: str) -> Path:
        """Path of a listed file whose size and hash were found right.

        Raises:
            ArtifactError: If it is not listed, missing, a link, or not what was committed.
        """
        path = self.path / name
        if name not in self._checked:
            record = self.records.get(name)
            if record is None:
                raise ArtifactError(f"{self.path} has no file {name!r} in its manifest.", _remake(self.manifest.stage))
            self._check_size(path, record)
            if _hash(path) != record.sha256:
                raise self._changed(path)
            self._checked.add(name)
        return path

    def check_sizes(self) -> None:
        """Raise an ArtifactError if a hashed file is missing, a link, or of another size than was committed."""
        for name, record in self.manifest.files.items():
            self._check_size(self.path / name, record)

    def _check_size(self, path: Path, record: FileRecord) -> None:
        try:
            size = _plain_size(path)
        except ArtifactError as error:
            raise ArtifactError(error.what, *error.advice, _remake(self.manifest.stage)) from None
        if size != record.size:
            raise self._changed(path)

    def _changed(self, path: Path) -> ArtifactError:
        return ArtifactError(
            f"{path} is not the file that was committed: its size or hash differs from the manifest.",
            "It was truncated, damaged or edited after it was written.",
            _remake(self.manifest.stage),
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a listed safetensors file, memory-mapped."""
        return read_tensors(self.file(name))

    def json(self, name: str) -> Any:
        """The value of a listed JSON file."""
        return read_json(self.file(name))


class Facts(dict[str, Any]):
    """The facts of an artifact; one that is asked for and not there is what an older version did not write."""

    def __init__(self, found: Artifact) -> None:
        super().__init__(found.manifest.facts)
        self.found = found

    def __missing__(self, name: str) -> Any:
        raise ArtifactError(
            f"{self.found.path} says nothing of {name!r}: another version of rpg made it.",
            _remake(self.found.manifest.stage),
        )


def read(path: Path, stage: str) -> Artifact:
    """Open the committed artifact of `stage` at `path`.

    Raises:
        ArtifactError: If it is missing, unfinished, of another stage or schema, its manifest is damaged, or a file is
            missing or of another size.
    """
    if not path.is_dir():
        if (old := _old(path)).is_dir():
            path = old  # A replacement was cut off between its two renames: the old artifact is still whole.
        elif _partial(path).is_dir():
            raise ArtifactError(f"{path} is unfinished.", f"Run `rpg {stage} --resume` to finish it.")
        else:
            raise ArtifactError(
                f"{path} does not exist.", f"Run `rpg {stage}` first, or name the right folder with --run."
            )
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{path} holds no {MANIFEST}: it is not an artifact of rpg.",
            f"Restore it from a copy, or move it away and run `rpg {stage}`.",
        )
    manifest = read_manifest(path / MANIFEST)
    if manifest.stage != stage:
        raise ArtifactError(f"{path} was made by `rpg {manifest.stage}`, but `rpg {stage}` is needed here.")
    found = Artifact(path, manifest)
    found.check_sizes()
    return found


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest file.

    Raises:
        ArtifactError: If it is damaged, of another schema, or names files outside its folder.
    """
    value = read_json(path)
    found = value.get("schema") if isinstance(value, dict) else None
    if found != SCHEMA:
        shown = found if isinstance(found, int) and abs(found) < 10**9 else "none"
        stage = str(value.get("stage")) if isinstance(value, dict) else ""
        raise ArtifactError(
            f"{path} has schema {shown}, this version of rpg reads {SCHEMA}.",
            f"Read it with the version that made it, or make it anew with `rpg {stage} --force`."
            if STAGE.fullmatch(stage)
            else "Make the artifact anew.",
        )
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise ArtifactError(f"{path} is not a manifest: {where}: {first['msg']}.", "Make the artifact anew.") from None
    identity = manifest.identity()
    if manifest.volatile.get("id", identity) != identity:
        raise ArtifactError(
            f"{path} is not the manifest that was committed: its hash differs.", _remake(manifest.stage)
        )
    for name in manifest.all_files():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ArtifactError(f"{path} lists a file with a forbidden name: {name!r}.", "Do not trust this folder.")
    return manifest


def verify(path: Path) -> tuple[Artifact, list[str]]:
    """Check every byte of the artifact at `path`.

    Returns:
        The artifact, and one line for each problem found.
    """
    found = Artifact(path, read_manifest(path / MANIFEST))
    problems: list[str] = []
    for name in sorted(found.records):
        if len(problems) >= MAX_PROBLEMS:
            return found, [*problems, f"{path} was not checked further"]
        try:
            file = found.file(name)
            if name.endswith(".safetensors"):
                tensors_of(file)
            elif name.endswith(".json"):
                read_json(file)
        except ArtifactError as error:
            problems.append(error.what)
    for entry in sorted(path.iterdir()):
        if entry.name != MANIFEST and entry.name not in found.records:
            problems.append(f"{entry} is not in the manifest")
    return found, problems


def read_json(path: Path, max_bytes: int | None = None) -> Any:
    """A JSON file, with duplicate keys, NaN, oversize and deep nesting refused as an ArtifactError."""
    if _plain_size(path) > (max_bytes or MAX_JSON_BYTES):
        raise ArtifactError(f"{path} is larger than any JSON file of rpg.", "It is damaged or no file of rpg.")
    text = path.read_bytes()
    if _num_values(text) > MAX_JSON_VALUES:
        raise ArtifactError(f"{path} holds more values than any JSON file of rpg.", "It is damaged or no file of rpg.")
    try:
        from_json(text)  # Refuses more than 200 levels, lone surrogates and other encodings, but not one key twice.
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        canonical(value)  # Refuses 1e999.
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.", "It is damaged; make the artifact anew.") from None
    return value


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes in a safetensors file, from its header alone."""
    size = _plain_size(path)
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if size < 8 or header_size > min(size - 8, MAX_HEADER_BYTES):
        raise ArtifactError(f"{path} is not a safetensors file: its header is truncated or absurdly large.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}.") from None
    except RuntimeError as error:  # torch could not map it: another process has just moved or cut it.
        raise ArtifactError(f"{path} cannot be read: {error}.") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped."""
    tensors_of(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError) as error:  # A dtype that torch does not have; moved meanwhile.
        raise ArtifactError(f"{path} cannot be read: {error}.") from None


def ahead(function: Callable[[Item], Found], items: Iterable[Item], num_ahead: int = 1) -> Iterator[Found]:
    """`function` of each item in turn; a thread calls it for the next ones while one is worked on."""
    coming = deque[Future[Found]]()
    with ThreadPoolExecutor(1) as aside:
        for item in items:
            coming.append(aside.submit(function, item))
            if len(coming) > num_ahead:
                yield coming.popleft().result()
        for last in coming:
            yield last.result()


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """The unfinished folder of one stage, `NAME.partial/`; `commit` turns it into the artifact."""

    target: Path
    path: Path
    stage: str
    section: dict[str, Any]
    inputs: dict[str, str]
    resumed: bool
    finished: Artifact | None
    """The artifact that is already there with the same key; nothing is left to do."""
    resumable: bool = False
    """Set once there is progress worth keeping: the folder then outlives an error."""
    spent: float = 0.0
    """Seconds of finished work that this process found."""
    _records: dict[str, FileRecord] = field(default_factory=dict)
    _varying: set[str] = field(default_factory=set)

    def add(self, name: str) -> Path:
        """Register a finished file of the draft: fsync and hash it."""
        assert FILE_NAME.fullmatch(name), name
        path = self.path / name
        with _writing(path):
            _sync(path)
            self._records[name] = FileRecord(size=_plain_size(path), sha256=_hash(path))
        return path

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file."""
        with self.saving_tensors(name, tensors) as append:
            for key, value in tensors.items():
                append(key, value)

    @contextmanager
    def saving_tensors(self, name: str, like: Mapping[str, Tensor]) -> Iterator[Callable[[str, Tensor], None]]:
        """Write a safetensors file piece by piece, see `writing_tensors`."""
        with writing_tensors(self.path / name, like, sync=False) as append:
            yield append
        self.add(name)

    def save_json(self, name: str, value: object, *, varies: bool = False) -> None:
        """Write a JSON file; `varies` from run to run (it holds seconds) leaves it out of the id."""
        self.save_bytes(name, canonical(value) + b"\n", varies=varies)

    def save_bytes(self, name: str, content: bytes, *, varies: bool = False) -> None:
        """Write a small file of any kind; `varies` from run to run leaves it out of the id."""
        write_bytes(self.path / name, content)
        self.add(name)
        if varies:
            self._varying.add(name)

    def take(self, found: Path) -> None:
        """Put a finished file of elsewhere into the folder: a link to it, or a copy where the disk has no links."""
        path = self.path / found.name
        with _writing(path):
            path.unlink(missing_ok=True)
            try:
                path.hardlink_to(found)
            except OSError:
                shutil.copyfile(found, path)

    @contextmanager
    def part(self) -> Iterator["Draft"]:
        """This draft as if it were empty; what is added meanwhile is added here at the end."""
        view = replace(self, _records={}, _varying=set())
        yield view
        self._records |= view._records
        self._varying |= view._varying

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of each finished file."""
        return {name: record.sha256 for name, record in self._records.items()}

    def commit(self, facts: Mapping[str, Any], volatile: Mapping[str, Any]) -> Artifact:
        """Write the manifest and put the folder in its place; an older artifact there is replaced.

        Working files that were not added (checkpoints, records of blocks) are deleted.
        """
        records = {name: record.model_dump() for name, record in sorted(self._records.items())}
        varying = {name: records.pop(name) for name in sorted(self._varying)}
        manifest = Manifest.model_validate({
            "schema": SCHEMA, "stage": self.stage, "key": _key(self.stage, self.section, self.inputs),
            "section": self.section, "inputs": self.inputs, "files": records, "facts": dict(facts),
            "volatile": {**volatile, **({"files": varying} if varying else {})},
        })  # fmt: skip
        manifest.volatile["id"] = manifest.identity()
        text = canonical(manifest.model_dump(by_alias=True)) + b"\n"
        if len(text) > MAX_JSON_BYTES or _num_values(text) > MAX_JSON_VALUES:
            raise RpgError(
                f"the manifest of {self.target} would list more files or facts than rpg reads.",
                "Split this artifact: fewer networks in one zoo, fewer tasks in one request.",
            )
        with _writing(self.target):
            for entry in self.path.iterdir():
                if entry.name not in {BEGUN, *self._records}:
                    _remove(entry)
            write_bytes(self.path / MANIFEST, text)
            self.resumable = True  # It is whole, and lacks its place alone.
            _sync(self.path)
            _place(self.path, self.target)
        return Artifact(self.target, manifest, made_now=True)


@contextmanager
def draft(
    target: Path,
    stage: str,
    *,
    section: dict[str, Any],
    inputs: Mapping[str, str],
    force: bool,
    resume: bool,
    as_today: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Iterator[Draft]:
    """Lock `target` and open its draft, or find it finished.

    Args:
        target: Folder of the artifact.
        stage: The command that makes it.
        section: Resolved recipe section; with `inputs` it makes the key.
        inputs: Name -> id of the artifacts it is made from.
        force: Replace a finished artifact of another key (at the end), discard an unfinished one.
        resume: Go on with an unfinished artifact of the same key.
        as_today: The section of a finished artifact as this version writes it, where an older one knew fewer settings.

    Raises:
        OutputError: Another process holds the lock, or something else is already there.
    """
    # What a reader of the manifest gets back, so that keys compare equal: tuples become lists.
    section, inputs = json.loads(canonical(section)), dict(inputs)
    key = _key(stage, section, inputs)
    make_folder(target.parent)
    partial, old = _partial(target), _old(target)
    with lock(target):
        with _writing(target):
            if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
                target.rmdir()  # As good as absent: `--out "$(mktemp -d)"`.
            if target.exists():
                _check_ours(target)
                _remove(old)
            elif old.exists():
                old.rename(target)
        if target.exists() and not force:
            found = read(target, stage)
            if found.manifest.key != key and _key(stage, as_today(found.section), found.manifest.inputs) != key:
                raise OutputError(
                    f"{target} exists and was made with other settings.",
                    *differences(found.manifest, section, inputs),
                    "Pass --force to replace it (at the end, atomically), or choose another --run or --out.",
                )
            yield Draft(target, target, stage, section, inputs, resumed=False, finished=found)
            return
        resumed = False
        if partial.is_symlink():
            raise OutputError(f"{partial} is a link: nothing is written through it.", "Delete it, or move it away.")
        with _writing(partial):
            if partial.exists() and not {entry.name for entry in partial.iterdir()} - {BEGUN + ".tmp"}:
                _remove(partial)  # Cut off before it was begun.
        if partial.exists():
            begun = _begun(partial)
            if resume and begun == key:
                if (partial / MANIFEST).exists():  # It was whole, and cut off just before its place was taken.
                    with _writing(target):
                        _place(partial, target)
                    yield Draft(target, target, stage, section, inputs, resumed=True, finished=read(target, stage))
                    return
                resumed = True
            elif force:
                with _writing(partial):
                    _remove(partial)
            elif begun == key:
                raise OutputError(f"{target} is unfinished.", "Pass --resume to go on, or --force to start afresh.")
            else:
                raise OutputError(
                    f"{partial} holds an unfinished `rpg {stage}` with other settings.",
                    "Pass --force to discard it, or give the settings it was begun with and --resume.",
                )
        work = Draft(target, partial, stage, section, inputs, resumed, None, resumable=resumed)
        try:
            if not resumed:
                with _writing(partial):
                    partial.mkdir()
                    write_bytes(partial / BEGUN, canonical({"stage": stage, "key": key}))
            yield work
        except BaseException:
            if not work.resumable:
                with suppress(OSError):  # What went wrong before is what matters.
                    _remove(partial)
            raise
        assert work.target.exists(), "a draft must be committed"


def differences(manifest: Manifest, section: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """One line for each setting or input that differs between an artifact and what is asked for."""
    before, after = _flat({"": manifest.section}), _flat({"": dict(section)})
    lines = [
        f"{name}: {_short(before.get(name))} there, {_short(after.get(name))} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    changed = (name for name in sorted(inputs) if manifest.inputs.get(name) != inputs[name])
    lines += [f"what it was made from has changed since: {name}" for name in changed]
    return [*lines[:12], *([f"and {len(lines) - 12} more"] if len(lines) > 12 else [])]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: object = None) -> None:
    """Write a safetensors file with one metadata entry, readable by the user's umask, synced.

    Raises:
        RpgError: If it cannot be written, for instance on a full disk.
    """
    with writing_tensors(path, tensors, header) as append:
        for name, value in tensors.items():
            append(name, value)


@contextmanager
def writing_tensors(
    path: Path, like: Mapping[str, Tensor], header: object = None, *, sync: bool = True
) -> Iterator[Callable[[str, Tensor], None]]:
    """`write_tensors` piece by piece, so that no more than a piece is in memory.

    Args:
        path: Of the file; it is there once all is written.
        like: Names, shapes and dtypes of the tensors; `meta` will do.
        header: The metadata entry.
        sync: Wait for the disk before it is there; not needed where `Draft.add` does.

    Yields:
        `append(name, values)`: what comes next of a tensor, in its order and dtype. All must be filled in the end.
    """
    start, places, ends, entries = 0, {}, {}, {}
    # Larger types first, so that each lies at a multiple of its size; then by name, whatever the order they come in.
    for name, value in sorted(like.items(), key=lambda item: (-list(DTYPES).index(item[1].dtype), item[0])):
        places[name], ends[name] = start, start + value.numel() * value.element_size()
        entries[name] = {
            "dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, ends[name]],
        }  # fmt: skip
        start = ends[name]
    described = {"__metadata__": {"rpg": canonical(header).decode()}, **entries}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path, 8 + len(text) + start) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def append(name: str, values: Tensor) -> None:
            content = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            assert values.dtype == like[name].dtype and places[name] + content.nbytes <= ends[name], name
            file.seek(8 + len(text) + places[name])
            file.write(content.data)
            places[name] += content.nbytes

        yield append
        assert places == ends, "a tensor is not whole"
        file.flush()
        if sync:
            os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically and synced.

    Raises:
        RpgError: If it cannot be written, for instance on a full disk.
    """
    with _replacing(path, len(content)) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UsageError: If a file is in the way or the place cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{path} is not a folder: a file is in the way.", "Choose another --run.") from None
    except OSError as error:
        raise _unwritable(path, "created", error) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written.", "Choose a --run that you can write to.")


# --- the small print --------------------------------------------------------------------------------------------------


def _key(stage: str, section: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    return digest({"stage": stage, "schema": SCHEMA, "section": section, "inputs": dict(inputs)})


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")  # Hidden: it is deleted, and zoo.old may be a copy of the user's.


def _check_ours(target: Path) -> None:
    """Refuse to touch, and above all to replace, what no stage wrote."""
    if not target.is_dir():
        raise UsageError(f"{target} is not a folder: a file is in the way.", "Choose another --run or --out.")
    if not (target / MANIFEST).is_file():
        raise ArtifactError(
            f"{target} exists but holds no {MANIFEST}: it is not an artifact of rpg.",
            "Move it away or delete it, or choose another --run or --out.",
        )


@contextmanager
def _writing(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn a failure of the disk into an RpgError that names the file, and the room it needs where that is known."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        name, reason = path, str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
        if isinstance(error, OSError):
            name, reason = Path(os.fsdecode(error.filename or path)), error.strerror or reason
        needs = ""
        if num_bytes is not None:
            with suppress(OSError):
                needs = f" ({num_bytes:,} bytes; {shutil.disk_usage(path.parent).free:,} are free)"
        raise RpgError(
            f"{name} could not be written{needs}: {reason}.",
            "Is the disk full, or the folder gone? Nothing that was finished is lost: run it again with --resume.",
        ) from None


@contextmanager
def _replacing(path: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once it is written."""
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path, num_bytes):
        _remove(temporary)  # Never written through: it may be a link to something else.
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                _remove(temporary)
            raise


def _unwritable(path: Path, verb: str, error: OSError) -> RpgError:
    """Why a folder or a lock cannot be made: a place that is no good, or a disk that fails."""
    if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR):
        return RpgError(f"{path} could not be {verb}: {error.strerror}.", "Nothing that existed was changed.")
    return UsageError(f"{path} cannot be {verb}: {error.strerror}.", "Choose a --run that you can write to.")


def _remake(stage: str) -> str:
    return f"Restore it from a copy, or make it anew with `rpg {stage} --force`."


def _begun(partial: Path) -> str | None:
    """The key of an unfinished artifact: from its manifest if it was whole already, else from what it began with."""
    for name in (MANIFEST, BEGUN):
        with suppress(ArtifactError):
            value = read_json(partial / name)
            return value.get("key") if isinstance(value, dict) else None
    return None


def _place(partial: Path, target: Path) -> None:
    """Put a finished folder in its place, an older one out of it."""
    old = _old(target)
    (partial / BEGUN).unlink(missing_ok=True)  # The manifest names the key from now on.
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            with suppress(OSError):  # Readers find it under its hidden name as well.
                old.rename(target)
        raise
    _sync(target.parent)
    _remove(old)


@contextmanager
def lock(target: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of an artifact: alone, to write it, or `shared`, to work on parts that lie elsewhere.

    Raises:
        LockedError: If another process holds it, and one of the two wants it alone.
    """
    path = target.with_name(f".{target.name}.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise _unwritable(path, "written", error) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise UsageError(f"{path} is a link to another file, or no file.", "Delete it.")
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{target} is being written by another process{_holder(descriptor)}.",
                "Wait until it has ended, or choose another --run.",
            ) from None
        with _writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)


def _holder(lock: int) -> str:
    """` (pid 123)`: who holds a lock."""
    time.sleep(0.02)  # Whoever has just taken it puts its number in place of the last one's at once.
    digits = "".join(c for c in os.pread(lock, 40, 0).decode(errors="replace") if c in "0123456789")
    return f" (pid {digits})" if digits else ""


def _plain_size(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path} is not a plain file.", "Links out of an artifact are not followed.")
    return status.st_size


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a folder and all in it, a file, or a link (never what it points to); nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _num_values(text: bytes) -> int:
    """At least the number of values and brackets in a JSON text."""
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, entry in value.items():
        path = f"{prefix}.{name}".strip(".")
        out |= _flat(entry, path) if isinstance(entry, dict) else {path: entry}
    return out
