"""The YAML of recipes: what is read, what is refused and where, overrides, and all problems at once."""

import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, field_validator, model_validator

from rpgcli.config import Config
from rpgcli.errors import RecipeError, UsageError
from rpgcli.strict_yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, Document, override, parse, read, validate


def value_of(scalar: str) -> Any:
    return parse(f"a: {scalar}", "x.yaml").value["a"]


def refusal(text: str | bytes, source: str = "x.yaml") -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, source)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Scalars


@pytest.mark.parametrize(
    "scalar, value",
    [
        ("0010100000", "0010100000"),
        ("-007", "-007"),
        ("00.5", "00.5"),
        ("0", 0),
        ("-3", -3),
        ("+3", 3),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("1E+3", 1000.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("12:30:00", "12:30:00"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("!!int '3'", 3),
        ("!!seq [1]", [1]),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ("'\u00e9\u6f22'", "\u00e9\u6f22"),
        ("|\n  x\n   y\n", "x\n y\n"),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(scalar: str, value: Any) -> None:
    assert value_of(scalar) == value
    assert type(value_of(scalar)) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(value_of(".nan"))


characters = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cf"])
texts = st.text(characters, max_size=20)
numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(texts, json_values, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_json_is_read_as_json(value: Any, ascii_only: Any) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only), "x.json").value == value


yaml_like = st.text(st.sampled_from("ab01:-?[]{}&*!|>'\"%@#,. \n\t\\x~<=e\u00e9\u2028\x1b"), max_size=60)


@given(st.text(max_size=60) | yaml_like | st.binary(max_size=60))
@settings(max_examples=500, deadline=1000)
def test_any_text_is_a_document_or_a_recipe_error_within_a_second(text: str | bytes) -> None:
    try:
        document = parse(text, "x.yaml")
    except RecipeError as error:
        assert error.what.startswith("x.yaml:")
    else:
        assert isinstance(document.value, dict)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "text, where, words",
    [
        ("a:\n\tb: 1", "2:1", "tab in the indentation"),
        ("a:\n  \tb: 1", "2:3", "tab in the indentation"),
        ("a:\t1", "1:3", "tab"),
        ("a: 1\nb: 2\na: 3", "3:1", "duplicate key 'a'; first on line 1"),
        ("a: {b: 1, b: 2}", "1:11", "duplicate key 'b'"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "3:3", "merge key <<"),
        ("a: !!python/object/apply:os.system ['echo']", "1:4", "tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !!python/name:os.system ''", "1:4", "tag"),
        ("a: !mine 1", "1:4", "the tag !mine"),
        ("a: !!timestamp 2024-01-01", "1:4", "tag"),
        ("a: !!binary aGk=", "1:4", "tag"),
        ("a: !!set {b}", "1:4", "tag"),
        ("a: !!int x", "1:4", "does not fit the text 'x'"),
        ("1: x", "1:1", "the key 1 is no text"),
        ("? [a]\n: 1", "1:3", "a key that is no text"),
        ("a: 1\n---\nb: 2", "2:1", "a second document"),
        ("- a", "1:1", "expected a mapping at the top, got a list"),
        ("text", "1:1", "got the text 'text'"),
        ("", "1:1", "got nothing"),
        ("# only a comment\n", "1:1", "got nothing"),
        ("a: *b", "1:4", "alias"),
        ("a: &a [*a]", "1:8", "the alias *a names nothing that is complete"),
        ("a: &x 1\nb: &x 2", "2:4", "the anchor &x is used twice"),
        ("a: [1, 2", "1:9", "not YAML"),
        ('a: "\\UFFFFFFFF"', "1:7", "not YAML: a number that is too large"),
        (f"a: {'9' * 5000}", "1:4", "a number of 5000 characters"),
        ("a: \x1b[31mred", "1:4", r"the control character '\x1b'"),
        ('a: "\\e[31mred"', "1:4", r"the control character '\x1b'"),
        ('"\\u202e": 1', "1:1", r"the control character '\u202e'"),
        ('a: "\\ud800"', "1:4", r"the control character '\ud800'"),
        ("a: 1\rb: 2", "1:5", r"the control character '\r'"),
        (b"a: 1\nb: \xff\xfe", "2:4", "not UTF-8: byte 0xff"),
        ("a: 1\n".encode("utf-16"), "1:1", "not UTF-8"),
        ("\ud800", "1:1", "not UTF-8"),
    ],
)
def test_what_a_recipe_never_needs_is_refused_with_its_place(text: str | bytes, where: str, words: str) -> None:
    message = refusal(text)
    assert message.startswith(f"x.yaml:{where}: ")
    assert words in message
    assert message.replace("\n", "").isprintable()


def test_a_byte_order_mark_and_windows_line_ends_are_read() -> None:
    assert parse(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", "x.yaml").value == {"a": 1, "b": 2}


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\n" * (2 * MAX_BYTES // 5), "more than 1 MiB"),
        ("a: " + "[" * 500_000, f"more than {MAX_DEPTH} levels"),
        ("a: " + "- " * 500_000, "sequence entries are not allowed here"),
        ("- " * 500_000, f"more than {MAX_DEPTH} levels"),
        ("a: [" + "1," * 500_000 + "]", f"more than {MAX_NODES} values"),
        (LAUGHS, f"more than {MAX_NODES} values"),
        ("a: &a " + "x" * 500_000 + "\nb: [" + "*a," * 9000 + "]", f"more than {MAX_NODES} values"),
        (
            "a: &a [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]\nb: [[[[[[[[[[[[[[[[[*a]]]]]]]]]]]]]]]]]",
            f"more than {MAX_DEPTH} levels",
        ),
    ],
)
def test_whatever_grows_too_large_is_refused_at_once(text: str | bytes, words: str) -> None:
    start = time.process_time()
    assert words in refusal(text)
    assert time.process_time() - start < 5  # 0.1 to 1.4, the latter where lines are counted; far more if it grew.


def test_an_alias_is_a_copy() -> None:
    document = parse("a: &x {n: 1}\nb: *x", "x.yaml")
    assert override(document, ["b.n=2"]).value == {"a": {"n": 1}, "b": {"n": 2}}


def test_marks_are_the_places_of_keys_and_items() -> None:
    document = parse("a:\n  b: [1, 2]\n", "x.yaml")
    assert document.marks == {
        (): (1, 1),
        ("a",): (1, 1),
        ("a", "b"): (2, 3),
        ("a", "b", 0): (2, 7),
        ("a", "b", 1): (2, 10),
    }
    assert document.location(("a", "b", 1)) == "x.yaml:2:10"
    assert document.location(("a", "missing", "deeper")) == "x.yaml:1:1"
    assert Document({}, "defaults", {}).location(("a",)) == ""


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(RecipeError, match=r"absent\.yaml cannot be read: No such file"):
        read(tmp_path / "absent.yaml")


def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads everything")
    with pytest.raises(RecipeError, match="Permission denied"):
        read(path)


def test_an_endless_file_is_read_only_up_to_the_limit() -> None:
    with pytest.raises(RecipeError, match="more than 1 MiB"):
        read(Path("/dev/zero"))


# ---------------------------------------------------------------------------------------------------------------------
# Overrides


@pytest.mark.parametrize(
    "assignment, value",
    [
        ("a.b=2", {"a": {"b": 2}, "l": [1]}),
        ("a.c.d=1e-4", {"a": {"b": 1, "c": {"d": 1e-4}}, "l": [1]}),
        ("a.b=0010", {"a": {"b": "0010"}, "l": [1]}),
        ("a.b=x=y, z", {"a": {"b": "x=y, z"}, "l": [1]}),
        ("a.b=", {"a": {"b": None}, "l": [1]}),
        ("a={c: [1, x]}", {"a": {"c": [1, "x"]}, "l": [1]}),
        ("l=[]", {"a": {"b": 1}, "l": []}),
    ],
)
def test_an_assignment_sets_one_value(assignment: str, value: Any) -> None:
    document = parse("a: {b: 1}\nl: [1]", "x.yaml")
    changed = override(document, [assignment])
    assert changed.value == value
    assert document.value == {"a": {"b": 1}, "l": [1]}
    keys = tuple(assignment.partition("=")[0].split("."))
    assert changed.location(keys) == "--set " + ".".join(keys)


def test_later_assignments_win() -> None:
    assert override(Document({}, "defaults", {}), ["a.b=1", "a.b=2"]).value == {"a": {"b": 2}}


def test_a_key_below_null_makes_the_mapping() -> None:
    assert override(parse("a: ~\nb: {c: null}", "x.yaml"), ["a.kind=x", "b.c.d=1"]).value == {
        "a": {"kind": "x"},
        "b": {"c": {"d": 1}},
    }


@pytest.mark.parametrize(
    "text, assignments, value",
    [
        ("{kind: old, n: 1, m: {k: 2}}", ["a.kind=new"], {"kind": "new"}),
        ("{kind: old, n: 1}", ["a.kind=old"], {"kind": "old", "n": 1}),
        ("{n: 1}", ["a.kind=new"], {"kind": "new", "n": 1}),
        ("{kind: ~, n: 1}", ["a.kind=new"], {"kind": "new", "n": 1}),
        ("{kind: old, n: 1}", ["a.kind=new", "a.n=2"], {"kind": "new", "n": 2}),
        ("{kind: old, n: 1, m: 3}", ["a.n=2", "a.kind=new"], {"kind": "new", "n": 2}),  # never lost in silence
        ("{kind: old, n: 1}", ["a={kind: older, n: 2}", "a.kind=new"], {"kind": "new"}),
        ("{kind: old, b: {kind: old, n: 1}}", ["a.b.kind=new"], {"kind": "old", "b": {"kind": "new"}}),
    ],
)
def test_another_kind_drops_the_keys_of_the_old_one(text: str, assignments: list[str], value: Any) -> None:
    assert override(parse(f"a: {text}\nl: 1", "x.yaml"), assignments).value == {"a": value, "l": 1}


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("a", "expected key.key=value"),
        ("=1", "expected key.key=value"),
        ("a..b=1", "expected key.key=value"),
        ("a b=1", "expected key.key=value"),
        ("a\x1b=1", r"a\x1b=1: expected key.key=value"),
        (".".join("a" * 50) + "=1", "expected key.key=value"),
        ("a.b.c=1", "--set a.b.c: a.b is 1, not a mapping"),
        ("l.0=1", "--set l.0: l is a list, not a mapping"),
        ("a=[1", "--set a:1:3: not YAML"),
        ("a=b: 1", "--set a:1:1: expected one value"),
        ("a=- 1", "--set a:1:1: expected one value"),
        ("a=\x1b", r"control character '\x1b'"),
    ],
)
def test_a_wrong_assignment_is_a_usage_error(assignment: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        override(parse("a: {b: 1}\nl: [1]", "x.yaml"), [assignment])
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Mamba(Config):
    kind: Literal["mamba2"] = "mamba2"
    d_model: PositiveInt = 8192
    d_state: PositiveInt = 128


class Lstm(Config):
    kind: Literal["lstm"] = "lstm"
    d_model: PositiveInt = 8192


class Ddim(Config):
    kind: Literal["ddim"] = "ddim"
    num_steps: int = 20
    eta: float = 0.0

    @field_validator("eta")
    @classmethod
    def _fraction(cls, eta: float) -> float:
        if not 0 <= eta <= 1:
            raise ValueError(f"lies in [0, 1], not {eta}")
        return eta


class Ddpm(Config):
    kind: Literal["ddpm"] = "ddpm"


Core = Annotated[Mamba | Lstm, Field(discriminator="kind")]
Sampler = Annotated[Ddim | Ddpm, Field(discriminator="kind")]


class Method(Config):
    core: Core = Mamba(d_model=256, d_state=64)
    spare: Core | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    name: str = ""

    @model_validator(mode="after")
    def _narrow(self) -> "Method":
        if self.core.d_model > 10_000:
            raise ValueError("core.d_model and the memory of this machine do not fit")
        return self


class Settings(Config):
    rpg: Method = Method(dtype="bfloat16")
    samplers: tuple[Sampler, ...] = ()
    state: int | Literal["random", "none"] = "random"
    lengths: tuple[int, int] = (1, 2)
    weights: dict[str, float] = {}
    ema: bool = True
    path: Path = Path("runs")


def problems(text: str | bytes, *assignments: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        validate(override(parse(text, "x.yaml"), assignments), Settings)
    return str(caught.value).splitlines()


def test_the_empty_recipe_is_the_defaults() -> None:
    assert validate(parse("{}", "x.yaml"), Settings) == Settings()


def test_a_model_survives_being_written_and_read() -> None:
    made = Settings(samplers=(Ddim(eta=0.5), Ddpm()), weights={"a": 1.0}, path=Path("x/y"))
    assert validate(parse(made.model_dump_json(), "x.yaml"), Settings) == made


def test_json_types_are_strict_but_whole_numbers_are_numbers_and_lists_are_tuples() -> None:
    made = validate(parse("weights: {a: 1}\nlengths: [3, 4]\nstate: 2\npath: there", "x.yaml"), Settings)
    assert (made.weights, made.lengths, made.state, made.path) == ({"a": 1.0}, (3, 4), 2, Path("there"))


def test_a_partial_mapping_keeps_kind_and_values_of_the_default() -> None:
    made = validate(parse("rpg: {core: {d_model: 128}}", "x.yaml"), Settings)
    assert made.rpg == Method(core=Mamba(d_model=128, d_state=64), dtype="bfloat16")


def test_another_kind_takes_nothing_from_the_default() -> None:
    made = validate(parse("rpg: {core: {kind: lstm}}", "x.yaml"), Settings)
    assert made.rpg.core == Lstm(d_model=8192)


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = """\
samplers:
  - kind: dim
  - kind: ddim
    steps: 5
    eta: 2
rpg:
  core:
    dstate: 3
    d_model: "3"
"""
    assert problems(text) == [
        "x.yaml has 5 problems:",
        "  x.yaml:2:5: samplers.0.kind: unknown sampler 'dim'; did you mean 'ddim'? known: ddim, ddpm",
        "  x.yaml:4:5: samplers.1.steps: unknown key; did you mean 'num_steps'? known: eta, kind, num_steps",
        "  x.yaml:5:5: samplers.1.eta: lies in [0, 1], not 2.0",
        "  x.yaml:8:5: rpg.core.dstate: unknown key; did you mean 'd_state'? known: d_model, d_state, kind",
        "  x.yaml:9:5: rpg.core.d_model: expected a whole number, got the text '3'",
    ]


@pytest.mark.parametrize(
    "text, line",
    [
        ("rgp: 1", "x.yaml:1:1: rgp: unknown key; did you mean 'rpg'? known: "),
        ("rpg: 5", "x.yaml:1:1: rpg: expected a mapping, got 5"),
        ("rpg: {core: 5}", "x.yaml:1:7: rpg.core: expected a mapping, got 5"),
        ("rpg: {core: ~}", "x.yaml:1:7: rpg.core: expected a mapping, got null"),
        ("rpg: {core: {kind: [1]}}", "x.yaml:1:14: rpg.core.kind: expected one of lstm, mamba2, got a list"),
        ("rpg: {core: {kind: lstm, d_state: 1}}", "rpg.core.d_state: unknown key; known: d_model, kind"),
        ("rpg: {core: {lstm: {d_model: 1}}}", "x.yaml:1:14: rpg.core.lstm: unknown key; known: d_model, d_state, kind"),
        ("rpg: {spare: {d_model: 1}}", "x.yaml:1:7: rpg.spare.kind: is missing; known: lstm, mamba2"),
        ("rpg: {spare: {kind: lstm, d_model: -1}}", "x.yaml:1:27: rpg.spare.d_model: expected greater than 0, got -1"),
        (
            "rpg: {dtype: flaot32}",
            "rpg.dtype: unknown dtype 'flaot32'; did you mean 'float32'? known: bfloat16, float32",
        ),
        ("rpg: {name: 1010}", "rpg.name: expected a text, got 1010: put it in quotes"),
        ("rpg: {core: {d_model: 20000}}", "x.yaml:1:1: rpg: core.d_model and the memory of this machine do not fit"),
        ("samplers: [{}]", "x.yaml:1:12: samplers.0.kind: is missing; known: ddim, ddpm"),
        ("samplers: {}", "samplers: expected a list, got a mapping"),
        ("state: never", "state: expected a whole number or 'random' or 'none', got the text 'never'"),
        ("lengths: [1]", "x.yaml:1:1: lengths.1: is missing and has no default"),
        ("lengths: [1, 2, 3]", "lengths: Tuple should have at most 2 items"),
        ("weights: {a: x}", "x.yaml:1:11: weights.a: expected a number, got the text 'x'"),
        ("weights: {a: .nan}", "weights.a: expected a finite number, got NaN"),
        ("ema: 1", "ema: expected true or false, got 1"),
        ("ema: on", "ema: expected true or false, got the text 'on'"),
        ("path: 'x\ty'\nema: '\U000e0001" + "z" * 500 + "'", "got the text '\\U000e0001zzz"),
    ],
)
def test_a_problem_says_where_what_and_what_was_expected(text: str | bytes, line: str) -> None:
    told = problems(text)
    assert told[0] == "x.yaml has 1 problem:"
    assert line in told[1]
    assert len(told[1]) < 200


def test_a_problem_of_an_override_names_the_override() -> None:
    assert problems("rpg: {}", "rpg.core.dmodel=3", "trianing.lr=1")[1:] == [
        "  --set rpg.core.dmodel: rpg.core.dmodel: unknown key; did you mean 'd_model'? known: d_model, d_state, kind",
        "  --set trianing.lr: trianing: unknown key; known: ema, lengths, path, rpg, samplers, state, weights",
    ]


def test_a_thousand_problems_are_counted() -> None:
    told = problems("".join(f"k{number}: 1\n" for number in range(1000)))
    assert told[0] == "x.yaml has 1000 problems:"
    assert told[-1] == "  and 950 more"
    assert len(told) == 52


@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "x"]), json_values, max_size=4))
@settings(max_examples=200, deadline=1000)
def test_any_document_is_a_model_or_a_recipe_error(value: Any) -> None:
    document = parse(json.dumps(value), "x.yaml")
    try:
        assert isinstance(validate(document, Settings), Settings)
    except RecipeError as error:
        assert error.what.startswith("x.yaml has ")
