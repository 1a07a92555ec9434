"""YAML for recipes: little of it, read by the rules of YAML 1.2, and every complaint with file, line and column.

PyYAML splits the text into events; what a scalar means is decided here, because YAML 1.1 reads `0010100000` as 2129920,
`1e-4` as text and `on` as true. What a recipe never needs is refused: tabs as indentation, duplicate keys, merge keys,
foreign tags, second documents, control characters, and whatever is too large, too deep, or grows so through aliases.

    text --parse--> Document --override--> Document --validate--> model

`keys` is the path of a value from the top of the document, such as `("rpg", "core", "d_model")`.
"""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rpgcli.errors import RecipeError, UsageError, nearest

Keys = tuple[str | int, ...]
Mark = tuple[int, int] | str
Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 2**20
"""A recipe is a few KiB."""
MAX_DEPTH = 32
MAX_NODES = 10_000
"""Keys and values after aliases are expanded; a long text counts once more for each KiB."""
MAX_DIGITS = 100
"""Longest whole number, in characters."""
MAX_PROBLEMS = 50
"""Problems told at once; more are counted."""
MAX_SHOWN = 60
"""Characters of a value that a message quotes."""

TAB_INDENTATION = re.compile(r"^ *\t", re.MULTILINE)
CONTROL = re.compile(  # with the marks that reorder or break a line unseen
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)

CONSTANTS = {"": None, "~": None, "null": None} | dict.fromkeys(("true", "True", "TRUE"), True)
CONSTANTS |= dict.fromkeys(("false", "False", "FALSE"), False)
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

TAG = "tag:yaml.org,2002:"
SCALAR_TAGS = {
    TAG + "str": str,
    TAG + "int": int,
    TAG + "float": float,
    TAG + "bool": bool,
    TAG + "null": type(None),
}


@dataclass(frozen=True)
class Document:
    """A mapping of plain values, and where each of them was written."""

    value: dict[str, Any]
    source: str
    """Name of the file as messages show it."""
    marks: dict[Keys, Mark]
    """Line and column, counted from 1, of each key or list item; or the words `--set a.b`."""

    def location(self, keys: Keys) -> str:
        """Where `keys`, or else the nearest mapping around it, was written: `recipes/x.yaml:12:5`; empty if nowhere."""
        for length in range(len(keys), -1, -1):
            mark = self.marks.get(keys[:length])
            if mark is not None:
                return mark if isinstance(mark, str) else f"{self.source}:{mark[0]}:{mark[1]}"
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Words of messages


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """`text`, shortened, with control characters and whatever else has no glyph escaped."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """`value` as a message quotes it: `the text '3'`, `true`, `a list`."""
    if isinstance(value, str):
        return f"the text '{printable(value)}'"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return printable(json.dumps(value))


def dotted(keys: Keys) -> str:
    """`rpg.core.d_model`."""
    return ".".join(printable(str(key)) for key in keys)


# ---------------------------------------------------------------------------------------------------------------------
# Text to document


def read(path: Path) -> Document:
    """Read the recipe file `path`.

    Raises:
        RecipeError: If it cannot be read, or is not the YAML described above.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror or error}.", "A recipe is a YAML file; `rpg recipes` lists some."
        ) from None
    return parse(data, str(path))


def parse(text: str | bytes, source: str) -> Document:
    """Parse one YAML document whose top is a mapping.

    Args:
        text: The document; bytes are UTF-8.
        source: Name of the file for messages.

    Raises:
        RecipeError: With line and column, if `text` is not the YAML described above.
    """
    reader = _Reader(text, source)
    value = reader.document()
    if not isinstance(value, dict):
        got = "nothing" if reader.root is None else shown(value)
        raise reader.error((1, 1), f"expected a mapping at the top, got {got}", "Write `{}` for a recipe of defaults.")
    return Document(value, source, {**reader.marks})


def override(document: Document, assignments: Sequence[str]) -> Document:
    """Apply `key.key=value` in order; a mapping or list given as value replaces the old one.

    Mappings that are missing or null are made. Another `kind` drops what stands beside it, which belongs to the old
    kind, except for what an assignment before it set.

    Raises:
        UsageError: If an assignment is not `key.key=value`, its value is no YAML scalar or flow collection, or its key
            lies below something that is not a mapping.
    """
    value, marks = copy.deepcopy(document.value), dict(document.marks)
    assigned: list[Keys] = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name) or name.count(".") >= MAX_DEPTH:
            raise UsageError(
                f"--set {printable(assignment)}: expected key.key=value.", "For example `--set rpg.core.d_model=128`."
            )
        keys, mark = tuple(name.split(".")), f"--set {printable(name)}"

        holder = value
        for depth, key in enumerate(keys[:-1], start=1):
            if holder.get(key) is None:
                holder[key] = {}
            holder = holder[key]
            marks.setdefault(keys[:depth], mark)
            if not isinstance(holder, dict):
                raise UsageError(
                    f"{mark}: {dotted(keys[:depth])} is {shown(holder)}, not a mapping.",
                    f"Set it as a whole: `--set {dotted(keys[:depth])}=...`.",
                )
        given, around = _parse_value(text, mark), keys[:-1]
        if keys[-1] == "kind" and holder.get("kind") not in (None, given):
            set_before = {path[len(around)] for path in assigned if path[: len(around)] == around != path}
            for key in holder.keys() - set_before:
                del holder[key]
        holder[keys[-1]] = given
        assigned.append(keys)
        marks = {path: old for path, old in marks.items() if path[: len(keys)] != keys} | {keys: mark}
    return replace(document, value=value, marks=marks)


def _parse_value(text: str, source: str) -> Any:
    """The value of one assignment: a scalar, `[...]` or `{...}`."""
    reader = _Reader(text, source)
    value = reader.document()
    if isinstance(reader.root, yaml.CollectionStartEvent) and not reader.root.flow_style:
        raise reader.error(reader.root, "expected one value", "Write mappings as {key: value} and lists as [a, b].")
    return value


class _Reader:
    """Builds plain values from PyYAML's events, and counts as it goes."""

    def __init__(self, text: str | bytes, source: str) -> None:
        self.source = source
        self.loader: Any = yaml.SafeLoader(self.checked(text))
        self.root: yaml.Event | None = None
        self.marks: dict[Keys, tuple[int, int]] = {}
        self.anchors: dict[str, Any] = {}
        self.num_nodes = 0

    def error(self, at: yaml.Event | tuple[int, int], words: str, *advice: str) -> RecipeError:
        line, column = at if isinstance(at, tuple) else _mark(at.start_mark)
        return RecipeError(f"{self.source}:{line}:{column}: {words}.", *advice)

    def checked(self, text: str | bytes) -> str:
        """`text` decoded, without byte order mark, after the checks that need no parser."""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if len(data) > MAX_BYTES:
            raise self.error((1, 1), "more than 1 MiB of text", "A recipe is a few KiB: is this the right file?")
        try:
            decoded = data.decode("utf-8")
        except UnicodeDecodeError as error:
            at = _position(data[: error.start].decode("utf-8"))
            raise self.error(at, f"not UTF-8: byte 0x{data[error.start]:02x}", "Save the file as UTF-8 text.") from None
        decoded = decoded.removeprefix("\ufeff")
        if found := CONTROL.search(decoded):
            raise self.error(
                _position(decoded[: found.start()]),
                f"the control character '{printable(found[0])}'",
                "Remove it; a recipe is plain text.",
            )
        if found := TAB_INDENTATION.search(decoded):
            raise self.error(_position(decoded[: found.end() - 1]), "a tab in the indentation", "Indent with spaces.")
        return decoded

    def next(self) -> yaml.Event:
        """The next event."""
        try:
            event: yaml.Event = self.loader.get_event()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark or self.loader.get_mark()
            words = printable(", ".join(part for part in (error.context, error.problem) if part), limit=200)
            raise self.error(_mark(mark), f"not YAML: {words}", *_advice(words)) from None
        except (ValueError, OverflowError):  # PyYAML gives \U and %YAML numbers to `chr` and `int` unchecked
            raise self.error(_mark(self.loader.get_mark()), "not YAML: a number that is too large") from None
        return event

    def document(self) -> Any:
        """The only document; None if there is none, and then `root` stays None."""
        self.next()  # start of the stream
        if isinstance(self.next(), yaml.StreamEndEvent):
            return None
        self.root = self.next()
        value = self.node(self.root, (), 1)
        self.next()  # end of the document
        if not isinstance(event := self.next(), yaml.StreamEndEvent):
            raise self.error(event, "a second document", "A recipe is one document: remove the `---`.")
        return value

    def node(self, event: yaml.Event, keys: Keys, depth: int) -> Any:
        """The value that `event` begins."""
        self.marks.setdefault(keys, _mark(event.start_mark))  # a mapping has noted the key already
        assert isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.error(
                    event, f"the alias *{printable(str(event.anchor))} names nothing that is complete before it"
                )
            num_nodes, height = _extent(self.anchors[event.anchor])
            self.count(event, num_nodes, depth + height - 1)
            return copy.deepcopy(self.anchors[event.anchor])
        if event.anchor in self.anchors:
            raise self.error(event, f"the anchor &{printable(event.anchor)} is used twice")

        if isinstance(event, yaml.SequenceStartEvent):
            value: Any = self.sequence(event, keys, depth)
        elif isinstance(event, yaml.MappingStartEvent):
            value = self.mapping(event, keys, depth)
        else:
            assert isinstance(event, yaml.ScalarEvent)
            value = self.scalar(event)
            self.count(event, _extent(value)[0], depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value
        return value

    def sequence(self, event: yaml.SequenceStartEvent, keys: Keys, depth: int) -> list[Any]:
        if event.tag not in (None, TAG + "seq"):
            raise self.error(event, f"the tag {printable(event.tag)} on a list", "Remove the tag.")
        self.count(event, 1, depth)
        values: list[Any] = []
        while not isinstance(item := self.next(), yaml.SequenceEndEvent):
            values.append(self.node(item, (*keys, len(values)), depth + 1))
        return values

    def mapping(self, event: yaml.MappingStartEvent, keys: Keys, depth: int) -> dict[str, Any]:
        if event.tag not in (None, TAG + "map"):
            raise self.error(event, f"the tag {printable(event.tag)} on a mapping", "Remove the tag.")
        self.count(event, 1, depth)
        values: dict[str, Any] = {}
        while not isinstance(item := self.next(), yaml.MappingEndEvent):
            key = self.key(item)
            path = (*keys, key)
            if key in values:
                raise self.error(
                    item, f"duplicate key '{printable(key)}'; first on line {self.marks[path][0]}", "Keep one."
                )
            self.marks[path] = _mark(item.start_mark)
            values[key] = self.node(self.next(), path, depth + 1)
        return values

    def key(self, event: yaml.Event) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise self.error(event, "a key that is no text", "Keys are words.")
        if event.style is None and event.value == "<<":
            raise self.error(event, "the merge key <<", "It is not part of YAML 1.2: write the keys out.")
        key = self.scalar(event)
        if not isinstance(key, str):
            raise self.error(event, f"the key {shown(key)} is no text", "Put it in quotes if it is meant.")
        self.count(event, 1, 1)
        return key

    def scalar(self, event: yaml.ScalarEvent) -> bool | int | float | str | None:
        if event.tag is not None and event.tag not in SCALAR_TAGS:
            raise self.error(event, f"the tag {printable(event.tag)} on a value", "Remove the tag.")
        expected = SCALAR_TAGS.get(event.tag) if event.tag else None
        if expected is str or (expected is None and event.style is not None):
            return self.text(event)
        if len(event.value) > MAX_DIGITS and INTEGER.fullmatch(event.value):
            raise self.error(event, f"a number of {len(event.value)} characters", f"At most {MAX_DIGITS} are read.")
        value = resolve(event.value)
        if expected is float and type(value) is int:
            value = float(value)
        if expected is not None and type(value) is not expected:
            raise self.error(
                event, f"the tag {printable(str(event.tag))} does not fit {shown(value)}", "Remove the tag."
            )
        return value

    def text(self, event: yaml.ScalarEvent) -> str:
        """The text of a scalar, without the control characters that escapes hide from `checked`."""
        value = event.value.encode("utf-16-le", "surrogatepass").decode(
            "utf-16-le", "surrogatepass"
        )  # joins JSON's pairs
        if found := CONTROL.search(value):
            raise self.error(event, f"a text with the control character '{printable(found[0])}'", "Remove it.")
        return value

    def count(self, event: yaml.Event, num_nodes: int, depth: int) -> None:
        """Count what `event` adds to the document."""
        self.num_nodes += num_nodes
        if self.num_nodes > MAX_NODES:
            raise self.error(event, f"more than {MAX_NODES} values, aliases expanded", "A recipe needs a few hundred.")
        if depth > MAX_DEPTH:
            raise self.error(event, f"more than {MAX_DEPTH} levels", "A recipe needs about five.")


def resolve(text: str) -> bool | int | float | str | None:
    """The value of an unquoted scalar by the core rules of YAML 1.2.

    A number that starts with a needless zero stays text, so that `0010100000` is ten task bits.
    """
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        return int(text, base=0)
    if FLOAT.fullmatch(text):
        return float(text)
    if INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _mark(mark: Any) -> tuple[int, int]:
    return mark.line + 1, mark.column + 1


def _position(before: str) -> tuple[int, int]:
    """Line and column of the character that follows `before`."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _advice(problem: str) -> tuple[str, ...]:
    """What to do about a complaint of PyYAML."""
    if "\\t" in problem:
        return ("Use spaces in place of the tab.",)
    if "cannot start any token" in problem or "alias" in problem:
        return ("Put the text in quotes.",)
    return ()


def _extent(value: Any) -> tuple[int, int]:
    """Number of nodes and height of a value; a long text counts once more for each KiB."""
    if isinstance(value, dict):
        below = [_extent(item) for item in value.values()]
        return 1 + len(value) + sum(nodes for nodes, _ in below), 1 + max((height for _, height in below), default=0)
    if isinstance(value, list):
        below = [_extent(item) for item in value]
        return 1 + sum(nodes for nodes, _ in below), 1 + max((height for _, height in below), default=0)
    return 1 + (len(value) // 1024 if isinstance(value, str) else 0), 1


# ---------------------------------------------------------------------------------------------------------------------
# Document to model


def validate(document: Document, model: type[Model]) -> Model:
    """Build `model` strictly from the document; what the document leaves out keeps its default.

    Raises:
        RecipeError: With all problems at once, each with its location.
    """
    document = fill_defaults(document, model)
    try:
        return model.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as error:
        problems, num_problems = _problems(document, model, error.errors(include_url=False))
    lines = [f"{place}: {words}" if place else words for place, words in problems]
    if num_problems > len(lines):
        lines.append(f"and {num_problems - len(lines)} more")
    plural = "" if num_problems == 1 else "s"
    raise RecipeError(f"{document.source} has {num_problems} problem{plural}:", *lines)


def fill_defaults(document: Document, model: type[BaseModel]) -> Document:
    """Complete partly written mappings from the defaults of their fields, so that a recipe says only what differs.

    pydantic drops a field's default as soon as a mapping is given. Here a mapping without `kind` takes the default's
    kind, and one of the same kind keeps what the default sets.
    """
    return replace(document, value=_filled(document.value, model, None))


def _filled(value: Any, annotation: Any, default: Any) -> Any:
    members = _members(annotation)
    if isinstance(value, list) and members:
        return [_filled(item, _item(members[0], index), None) for index, item in enumerate(value)]
    models = _models(annotation)
    if not isinstance(value, dict) or not models:
        return value

    if len(models) > 1 and "kind" not in value and type(default) in models and "kind" in type(default).model_fields:
        value = {"kind": default.kind, **value}
    chosen = models[0] if len(models) == 1 else _by_kind(models).get(str(value.get("kind")))
    if chosen is None:
        return value
    fields = chosen.model_fields
    if type(default) is chosen:
        plain = default.model_dump(mode="json", include=default.model_fields_set)
        inner = {name: getattr(default, name) for name in fields}
    else:
        plain = {}
        inner = {name: field.get_default(call_default_factory=True) for name, field in fields.items() if name in value}
    filled = {
        key: _filled(item, fields[key].annotation, inner[key]) if key in fields else item for key, item in value.items()
    }
    return plain | filled


def _members(annotation: Any) -> list[Any]:
    """The types that a field accepts besides None: `Annotated` and unions taken apart."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation in (None, type(None)) else [annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]


def _by_kind(models: Iterable[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """Models by the literals of their `kind`."""
    kinds = {model: get_args(model.model_fields["kind"].annotation) for model in models if "kind" in model.model_fields}
    return {str(kind): model for model, literals in kinds.items() for kind in literals}


def _item(annotation: Any, index: int) -> Any:
    """Type of item `index` of a list or tuple type; None if unknown."""
    arguments = get_args(annotation)
    if len(arguments) == 1 or (len(arguments) == 2 and arguments[1] is Ellipsis):
        return arguments[0]
    return arguments[index] if get_origin(annotation) is tuple and index < len(arguments) else None


@dataclass(frozen=True)
class _Found:
    """Where an error of pydantic lies in the document."""

    keys: Keys
    owner: type[BaseModel] | None
    """The model that has or lacks the last key."""
    annotation: Any
    """What the value should have been."""


def _follow(annotation: Any, value: Any, location: Sequence[str | int]) -> _Found:
    """Walk pydantic's location, which also names the member of each union, along the types and the document."""
    keys: Keys = ()
    owner: type[BaseModel] | None = None
    for part in location:
        models = _models(annotation)
        if len(models) > 1:  # the part is the kind that was chosen
            annotation = _by_kind(models).get(str(part))
        elif models and isinstance(value, dict):
            owner = models[0]
            field = owner.model_fields.get(str(part))
            annotation, value, keys = field.annotation if field else None, value.get(str(part)), (*keys, part)
        elif isinstance(value, list) and isinstance(part, int):
            members = _members(annotation)
            annotation = _item(members[0], part) if members else None
            value, keys = value[part] if part < len(value) else None, (*keys, part)
        elif isinstance(value, dict) and part in value:
            annotation, value, keys = (get_args(annotation) or [None])[-1], value[str(part)], (*keys, part)
        # any other part names a member of a plain union, such as `int`
    return _Found(keys, owner, annotation)


def _problems(
    document: Document, model: type[BaseModel], errors: Iterable[ErrorDetails]
) -> tuple[list[tuple[str, str]], int]:
    """Location and words of the first MAX_PROBLEMS problems, in the order of the document, and the number of all."""
    found: dict[Keys, list[tuple[_Found, ErrorDetails]]] = {}
    for error in errors:
        at = _follow(model, document.value, error["loc"])
        keys = (*at.keys, "kind") if error["type"].startswith("union_tag") else at.keys
        found.setdefault(keys, []).append((at, error))

    written = {keys: order for order, keys in enumerate(document.marks)}
    order = sorted(found, key=lambda keys: max(written.get(keys[:length], -1) for length in range(len(keys) + 1)))
    problems = []
    for keys in order[:MAX_PROBLEMS]:
        words = "; ".join(_words(keys, found[keys]))
        problems.append((document.location(keys), f"{dotted(keys)}: {words}" if keys else words))
    return problems, len(order)


EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
"""What pydantic calls integers, objects and arrays."""


def _words(keys: Keys, found: list[tuple[_Found, ErrorDetails]]) -> list[str]:
    """What to say about the value at `keys`; the members of a plain union complain once each."""
    expected, words = [], []
    for at, error in found:
        message, value = error["msg"], error["input"]
        members = _members(at.annotation)
        if error["type"] == "extra_forbidden":
            words.append("unknown key" + nearest(printable(str(keys[-1])), at.owner.model_fields if at.owner else ()))
        elif error["type"] == "missing":
            words.append("is missing and has no default")
        elif error["type"].startswith("union_tag"):
            kinds = _by_kind(_models(at.annotation))
            if "kind" in value:
                words.append(_unknown(keys, value["kind"], kinds))
            else:
                words.append(f"is missing; known: {', '.join(sorted(kinds))}")
        elif error["type"] == "literal_error" and members and all(get_origin(member) is Literal for member in members):
            words.append(_unknown(keys, value, [str(choice) for member in members for choice in get_args(member)]))
        elif error["type"] in ("value_error", "assertion_error"):
            words.append(str(error["ctx"]["error"]))
        elif error["type"] in EXPECTED or message.startswith("Input should be "):
            expected.append(EXPECTED.get(error["type"], message.removeprefix("Input should be ")))
        else:
            words.append(message)
    if expected:
        value = found[0][1]["input"]
        quote = expected == ["a text"] and isinstance(value, int | float)
        words.insert(
            0, f"expected {' or '.join(expected)}, got {shown(value)}" + (": put it in quotes" if quote else "")
        )
    return words


def _unknown(keys: Keys, value: object, known: Iterable[str]) -> str:
    """`unknown sampler 'dim'; did you mean 'ddim'? known: ddim, ddpm`, named after the key around a `kind`."""
    if not isinstance(value, str):
        return f"expected one of {', '.join(sorted(known))}, got {shown(value)}"
    around = keys[:-1] if keys[-1] == "kind" and len(keys) > 1 else keys
    name = str(around[-1]) if isinstance(around[-1], str) else str(around[-2]).removesuffix("s")  # samplers.0
    return f"unknown {printable(name)} '{printable(value)}'" + nearest(printable(value), known)
