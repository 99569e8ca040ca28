"""Parses a recipe into checked tables. Errors name the line and the nearest key."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from tokenward.config.lines import Lines
from tokenward.config.places import wrong_places
from tokenward.config.problems import either, nearest, refusal, renamed_keys, show, unknown_keys, wrong_values
from tokenward.config.schema import Recipe
from tokenward.errors import UserError
from tokenward.hidden import MASK, hidden, is_secret

_MAX_DEPTH = 20
_MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000
_MAX_INTEGER = 2**63


class Source(NamedTuple):
    """The content of a YAML text, and the line of every key."""

    values: Any
    numbers: dict[str, int]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: 1e-5 is a number; 1:30, 010 and 2024-01-01 are text; no merge keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the name and type are PyYAML's

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = 0  # read so far


_RESOLVERS = {
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}
for _kind, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list(_first))


def read_source(text: str, name: str) -> Source:
    """Read one YAML document.

    Raises:
        UserError: the text is not YAML, or a table has a key twice.
    """
    numbers: dict[str, int] = {}
    if len(text) > _MAX_BYTES:
        message = f"{name} has {len(text):,} characters, and a recipe at most {_MAX_BYTES:,}. Check that this file is the recipe."
        raise UserError(message, code="too-large")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        except RecursionError:
            message = f"{name}: tables are nested deeper than {_MAX_DEPTH} levels. Flatten them."
            raise UserError(message, code="invalid-yaml") from None
        values = None if node is None else _value(loader, node, (), numbers, name)
    except yaml.YAMLError as error:
        raise UserError(_syntax_message(error, text, name), code="invalid-yaml") from error
    return Source(values, numbers)


def _syntax_message(error: yaml.YAMLError, text: str, name: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line, problem = error.problem_mark.line + 1, error.problem or error.context
    else:
        position = getattr(error, "position", 0)  # only PyYAML's ReaderError has one
        line, problem = text.count("\n", 0, position) + 1, str(error).splitlines()[0]
    hint = " Indent with spaces." if "\\t" in str(problem) else _open_bracket(error)
    return f"{name}:{line}: this is not valid YAML: {problem}.{hint}"


def _open_bracket(error: yaml.YAMLError) -> str:
    # YAML notices an unclosed bracket only lines later, at the next key.
    context = getattr(error, "context", None) or ""
    mark = getattr(error, "context_mark", None)
    if "flow" not in context or mark is None:
        return ""
    return f" Check the bracket opened on line {mark.line + 1}, column {mark.column + 1}: it may be unclosed or lack a comma."


def _value(
    loader: _Loader, node: yaml.Node, path: tuple[str, ...], numbers: dict[str, int], name: str
) -> Any:
    line = node.start_mark.line + 1
    loader.values += 1
    if loader.values > _MAX_VALUES:  # an alias of aliases stands for more values than it has characters
        message = (
            f"{name}:{line}: the recipe has more than {_MAX_VALUES:,} values. Remove its aliases (*name)."
        )
        raise UserError(message, code="too-large")
    if len(path) > _MAX_DEPTH:
        message = f"{name}:{line}: tables are nested deeper than {_MAX_DEPTH} levels. Flatten them."
        raise UserError(message, code="invalid-yaml")
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, numbers, name)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            numbers[".".join((*path, str(i)))] = item.start_mark.line + 1
        return [_value(loader, item, (*path, str(i)), numbers, name) for i, item in enumerate(node.value)]
    return _scalar(loader, node, name)


def _mapping(
    loader: _Loader, node: yaml.MappingNode, path: tuple[str, ...], numbers: dict[str, int], name: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"{name}:{line}: a key must be text, not a table or a list.", code="invalid-yaml")
        if key in seen:
            table = ".".join(path) or "the recipe"
            raise UserError(
                f"{name}:{line}: key '{key}' appears twice in {table}, first on line {seen[key]}. Keep one.",
                code="duplicate-key",
                key=".".join((*path, key)),
            )
        seen[key] = numbers[".".join((*path, key))] = line
        values[key] = _value(loader, value_node, (*path, key), numbers, name)
    return values


def _scalar(loader: _Loader, node: yaml.Node, name: str) -> Any:
    line = node.start_mark.line + 1
    try:
        value = loader.construct_object(node)
    except (ValueError, KeyError, TypeError) as error:  # an explicit tag on the wrong text, like `!!int abc`
        message = f"{name}:{line}: cannot read {node.value!r} as {node.tag}. Remove the tag."
        raise UserError(message, code="invalid-yaml") from error
    if isinstance(value, float) and not math.isfinite(value):
        message = f"{name}:{line}: {node.value} is not a finite number. Write a finite one."
        raise UserError(message, code="not-finite")
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        message = (
            f"{name}:{line}: {node.value[:20]}... is too large a number. Write one of at most 19 digits."
        )
        raise UserError(message, code="out-of-range")
    if not isinstance(value, str | int | float | None):
        message = f"{name}:{line}: a recipe cannot hold {node.tag}. Remove the tag."
        raise UserError(message, code="invalid-yaml")
    return value


def apply_override(values: dict[str, Any], lines: Lines, text: str) -> Lines:
    """Write one ``a.b=value`` into ``values``, and record its origin."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    parts = key.split(".")
    if is_secret(key, value_text.strip()):
        text = f"{key}={MASK}"
    if not equals or not all(parts):
        message = f"--set {text}: expected a key and a value, such as --set oracle.fraction=0.5."
        raise UserError(message, code="bad-override")
    value = read_source(value_text, f"--set {key}").values
    _table_for(values, parts, text)[parts[-1]] = value
    kept = {k: n for k, n in lines.numbers.items() if k != key and not k.startswith(f"{key}.")}
    return Lines(lines.name, kept, (*lines.overridden, key))


def _table_for(values: dict[str, Any], parts: list[str], text: str) -> dict[str, Any]:
    table = values
    for depth, part in enumerate(parts[:-1], start=1):
        inner = table.get(part)
        if inner is None:
            inner = table[part] = {}
        if not isinstance(inner, dict):
            outer = ".".join(parts[:depth])
            raise UserError(
                f"--set {text}: {outer} is {hidden({part: inner})[part]!r}, not a table, so it has no key '{parts[depth]}'. "
                f"Set {outer} as a whole.",
                code="bad-override",
                key=outer,
            )
        table = inner
    return table


_LEAST = "model:\n  name: default\ndata:\n  source: builtin"


class LoadedRecipe(NamedTuple):
    """A recipe, and where its keys were written."""

    recipe: Recipe
    lines: Lines


class Resolved(NamedTuple):
    """A value of a recipe, and its origin: ``default``, ``file:line`` or ``--set``."""

    key: str
    value: Any
    origin: str


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file, apply ``a.b=value`` overrides and check the keys and values.

    Raises:
        UserError: the file is missing, its YAML is malformed, a key is unknown or a value is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            message = f"{path}: this is not UTF-8 text (byte {error.start}). Save it as UTF-8."
            raise UserError(message, code="not-utf8") from error
        raise UserError(_missing_message(Path(path)), code="missing-file") from error
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Check a recipe given as text. Messages and the default run folder use ``name``."""
    values, numbers = read_source(text, name)
    if values is None:
        raise UserError(f"{name}: the recipe is empty. Write at least:\n{_LEAST}", code="empty-recipe")
    if not isinstance(values, dict):
        message = f"{name}:1: a recipe must be a table, got {show(values)}. Write at least:\n{_LEAST}"
        raise UserError(message, code="not-a-table")
    lines = Lines(name, numbers)
    for override in overrides:
        lines = apply_override(values, lines, override)
    hidden(values)  # from now on, no message shows its secrets
    return LoadedRecipe(_checked(values, lines), lines)


def resolved(loaded: LoadedRecipe) -> list[Resolved]:
    """Every value of a recipe with its origin, in the order of the schema."""
    leaves = _leaves(loaded.recipe.model_dump(), ())
    return [Resolved(key, value, loaded.lines.origin(key)) for key, value in leaves]


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield ".".join(path), value


def _missing_message(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder, not a recipe. Name a .yaml file in it."
    folder = path.parent if path.parent.is_dir() else Path()
    found = {
        p.name: p
        for pattern in ("*.yaml", "*.yml")
        for p in (*folder.glob(pattern), *Path("recipes").glob(pattern))
    }
    close = nearest(path.name, sorted(found))
    listed = either(sorted(found)) or "none"
    advice = f"Did you mean {found[close[0]]}?" if close else f"Recipes found: {listed}."
    return f"there is no recipe {path}. {advice}"


def _checked(values: dict[str, Any], lines: Lines) -> Recipe:
    problems = [*renamed_keys(values)] or [*unknown_keys(values)]
    if not problems:
        values.setdefault("run", f"runs/{Path(lines.name).stem}")
        try:
            recipe = Recipe.model_validate(values)
            problems = [*wrong_places(values, lines)]
            if not problems:
                return recipe
        except ValidationError as error:
            problems = [*wrong_values(error, values)]
    problems.sort(key=lambda problem: lines.line_of(problem.key) or 0)
    raise refusal(problems, lines.where)
