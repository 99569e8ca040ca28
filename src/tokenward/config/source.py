"""A recipe's text to checked tables. Every error names the line and the nearest key."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from tokenward.config.problems import either, nearest, renamed_keys, show, unknown_keys, wrong_values
from tokenward.config.schema import Recipe
from tokenward.errors import UserError

_MAX_DEPTH = 20


@dataclass(frozen=True)
class Lines:
    """Where the keys of a recipe were written, for messages about them."""

    name: str
    numbers: Mapping[str, int] = field(default_factory=dict)
    overridden: tuple[str, ...] = ()

    def line_of(self, key: str) -> int | None:
        """The line of a dotted key in the file, or None if it is not written there."""
        return self.numbers.get(key)

    def origin(self, key: str) -> str:
        """Where the value of a dotted key comes from: ``default``, ``file:line`` or ``--set``."""
        if self._override(key) is not None:
            return "--set"
        line = self.line_of(key)
        return "default" if line is None else f"{self.name}:{line}"

    def where(self, key: str) -> str:
        """The place to name in a message about a dotted key: its own, or that of the table around it."""
        override = self._override(key)
        if override is not None:
            return f"--set {override}"
        # What is wrong with a table may be the file's or lie in any change inside it.
        inside = dict.fromkeys(o for o in self.overridden if o.startswith(f"{key}."))
        changes = " and ".join(f"--set {o}" for o in inside)
        if changes and self.line_of(key) is None:
            return changes
        while key and self.line_of(key) is None:
            key = key.rpartition(".")[0]
        place = f"{self.name}:{self.line_of(key)}" if key else self.name
        return f"{place} with {changes}" if changes else place

    def _override(self, key: str) -> str | None:
        covering = (o for o in reversed(self.overridden) if key == o or key.startswith(f"{o}."))
        return next(covering, None)


class Source(NamedTuple):
    """What a YAML text holds, with the line of every key."""

    values: Any
    numbers: dict[str, int]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: 1e-5 is a number; 1:30, 010 and 2024-01-01 are text; no merge keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the name and type are PyYAML's


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
        UserError: the text is no YAML, or a key is written twice in one table.
    """
    numbers: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = None if node is None else _value(loader, node, (), numbers, name)
    except yaml.YAMLError as error:
        raise UserError(_syntax_message(error, text, name)) from error
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
    """Where the bracket stands that YAML still waits for: it is noticed lines later, where the next key surprises."""
    context = getattr(error, "context", None) or ""
    mark = getattr(error, "context_mark", None)
    if "flow" not in context or mark is None:
        return ""
    return f" A bracket was opened on line {mark.line + 1}, column {mark.column + 1}: is it closed, with commas between its values?"


def _value(
    loader: _Loader, node: yaml.Node, path: tuple[str, ...], numbers: dict[str, int], name: str
) -> Any:
    line = node.start_mark.line + 1
    if len(path) > _MAX_DEPTH:
        raise UserError(f"{name}:{line}: tables are nested deeper than {_MAX_DEPTH} levels. Flatten them.")
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
            raise UserError(f"{name}:{line}: a key must be a word, not a table or a list.")
        if key in seen:
            table = ".".join(path) or "the recipe"
            raise UserError(
                f"{name}:{line}: key '{key}' appears twice in {table}, first on line {seen[key]}. Keep one."
            )
        seen[key] = numbers[".".join((*path, key))] = line
        values[key] = _value(loader, value_node, (*path, key), numbers, name)
    return values


def _scalar(loader: _Loader, node: yaml.Node, name: str) -> Any:
    line = node.start_mark.line + 1
    try:
        value = loader.construct_object(node)
    except ValueError as error:  # an explicit tag over the wrong text, like `!!int abc`
        raise UserError(
            f"{name}:{line}: cannot read {node.value!r} as {node.tag}. Leave out the tag."
        ) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}:{line}: {node.value} is not a number to compute with. Write a finite one.")
    if not isinstance(value, str | int | float | None):
        raise UserError(f"{name}:{line}: {node.tag} has no place in a recipe. Leave out the tag.")
    return value


def apply_override(values: dict[str, Any], lines: Lines, text: str) -> Lines:
    """Write one ``a.b=value`` into ``values``, and note where it came from."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {text}: this is not a key and a value. Write --set oracle.fraction=0.5.")
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
                f"--set {text}: {outer} is {inner!r}, not a table, so it holds no '{parts[depth]}'. "
                f"Set {outer} as a whole."
            )
        table = inner
    return table


_LEAST = "model:\n  name: default\ndata:\n  source: builtin"


class LoadedRecipe(NamedTuple):
    """A recipe and where its keys were written."""

    recipe: Recipe
    lines: Lines


class Resolved(NamedTuple):
    """One value of a recipe, and where it comes from: ``default``, ``file:line`` or ``--set``."""

    key: str
    value: Any
    origin: str


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file, apply ``a.b=value`` overrides and check everything.

    Raises:
        UserError: no such file, malformed YAML, an unknown key or a wrong value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(_missing_message(Path(path))) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Check a recipe given as text; messages and the default run folder call it ``name``."""
    values, numbers = read_source(text, name)
    if values is None:
        raise UserError(f"{name}: the recipe is empty. Write at least:\n{_LEAST}")
    if not isinstance(values, dict):
        raise UserError(f"{name}:1: a recipe is a table, got {show(values)}. Write at least:\n{_LEAST}")
    lines = Lines(name, numbers)
    for override in overrides:
        lines = apply_override(values, lines, override)
    return LoadedRecipe(_checked(values, lines), lines)


def resolved(loaded: LoadedRecipe) -> list[Resolved]:
    """Every value of a recipe in the order of the schema, with its origin."""
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
    advice = (
        f"Did you mean {found[close[0]]}?"
        if close
        else f"Recipes near it: {either(sorted(found)) or 'none'}."
    )
    return f"There is no recipe {path}. {advice}"


def _checked(values: dict[str, Any], lines: Lines) -> Recipe:
    problems = [*renamed_keys(values)] or [*unknown_keys(values)]
    if not problems:
        values.setdefault("run", f"runs/{Path(lines.name).stem}")
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            problems = [*wrong_values(error, values)]
    problems.sort(key=lambda problem: lines.line_of(problem.key) or 0)
    raise UserError("\n".join(f"{lines.where(key)}: {message}" for key, message in problems))
