"""Find an extension by its short name or by ``"module:Name"``, and build it from a recipe's table."""

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tokenward.errors import UserError

_CODE: dict[str, str] = {}
"""Fingerprints of modules as they were first seen: a process imports each once, so what it computes belongs to that."""


def build(kind: str, name: str, arguments: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """An extension object, ready to call.

    Args:
        kind: What it is, for messages: ``objective``, ``selection`` and so on.
        name: A key of ``known``, or ``"module:Name"`` of a class or function.
        arguments: Keyword arguments from the recipe.
        known: The built-in ones.

    Raises:
        UserError: no such name, an unknown argument or a value of the wrong type, each with the
            nearest thing that exists.
    """
    target = find(kind, name, known)
    if inspect.isfunction(target):
        if not arguments:
            return target
        _check_settings(kind, name, arguments, target)
    _check_names(kind, name, arguments, target)
    if dataclasses.is_dataclass(target):
        return _validated(kind, name, arguments, target)
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind} {name} could not be made from {dict(arguments)}: {error}") from error


def check_call(kind: str, name: str, made: Any, arguments: Sequence[str]) -> None:
    """Refuse an object of one's own that cannot be called with these, before anything is computed for it.

    Raises:
        UserError: it is not callable, or its signature takes fewer or more.
    """
    remedy = f"It is called as f({', '.join(arguments)})."
    if not callable(made):
        raise UserError(
            f"{kind} {name} is {_a(type(made).__name__)}, which cannot be called. {remedy} A class needs __call__."
        )
    try:
        inspect.signature(made).bind(*arguments)
    except TypeError as error:
        taken = ", ".join(inspect.signature(made).parameters)
        raise UserError(f"{kind} {name} takes ({taken}): {error}. {remedy}") from error
    except ValueError:
        return  # a function written in C may not say what it takes


def find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """The class or function behind a name; see :func:`build`."""
    if name in known:
        return known[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        if not known:
            raise UserError(
                f'a {kind} is a function of your own, and {name!r} names no module. Write "module:name".'
            )
        raise UserError(
            f'there is no {kind} {name!r}. {hint}Known: {", ".join(known)}; or write "module:Name" for one of your own.'
        )
    module_name, _, attribute = name.partition(":")
    # A recipe's plugin usually stands beside it, where `python -m` would find it and an entry point does not.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UserError(
            f"{kind} {name!r}: the module {module_name!r} cannot be imported ({error}). It must be installed or stand in "
            f"the current folder {Path.cwd()}."
        ) from error
    except AttributeError as error:
        raise UserError(f"{kind} {name!r}: the module {module_name!r} has no {attribute!r}.") from error
    if not callable(target):
        raise UserError(
            f"{kind} {name!r} is {_a(type(target).__name__)}, which cannot be called. Name a function{' or a class' if known else ''}."
        )
    return target


def optional_package(module: str, user: str, extra: str) -> ModuleType:
    """A module that an extra of this package installs.

    Args:
        module: Its name.
        user: What needs it, for the message.
        extra: The extra that brings it.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{user} needs {module}, which cannot be imported ({error}). Install it: pip install 'tokenward[{extra}]'."
        ) from error


def name_of(made: Any) -> str:
    """What a message calls an object: ``module:Name`` of one's own class or function, the settings too of a built-in one."""
    own = made if inspect.isfunction(made) or inspect.isclass(made) else type(made)
    if own.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return str(made) if dataclasses.is_dataclass(made) else own.__qualname__
    return f"{own.__module__}:{own.__qualname__}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def code_fingerprints(settings: Any) -> dict[str, str]:
    """Fingerprint of the file behind every ``"module:Name"`` in a stage's settings, by that name.

    Built-in names and what was not written in Python have no file of one's own and are left out.
    """
    found = {name: _code_fingerprint(name.partition(":")[0]) for name in _plugin_names(settings)}
    return {f"code of {name}": digest for name, digest in found.items() if digest}


def _plugin_names(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            yield value
        return
    if isinstance(value, Mapping):
        value = [*value, *value.values()]  # a step of a selection is named by its key
    for inner in value if isinstance(value, list | tuple) else ():
        yield from _plugin_names(inner)


def _code_fingerprint(module: str) -> str:
    if module not in _CODE:
        file = _file_of(module)
        if file is None or module.partition(".")[0] == __name__.partition(".")[0]:
            return ""
        _CODE[module] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return _CODE[module]


def _file_of(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a text that only looks like a name; a module that a test made by hand
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _check_settings(kind: str, name: str, arguments: Mapping[str, Any], target: Any) -> None:
    """Refuse settings of a plain function: a function takes them only if it makes the object from them alone."""
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{kind} {name} is a function, which is called as it is and has no settings; got {', '.join(arguments)}. Leave "
            "them out, or write a class whose __init__ takes them and whose __call__ does what the function does."
        ) from error


def _check_names(kind: str, name: str, arguments: Mapping[str, Any], target: Any) -> None:
    allowed = [key for key in inspect.signature(target).parameters if key != "_"]
    for key in arguments:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"{kind} {name} has no setting {key!r}. {hint}It takes: {', '.join(allowed) or 'none'}."
            )


def _validated(kind: str, name: str, arguments: Mapping[str, Any], target: Any) -> Any:
    try:
        return TypeAdapter(target).validate_python(dict(arguments))
    except ValidationError as error:
        _check_left_open(kind, name, error)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{kind} {name}: {where} is {first['input']!r}. {first['msg']}.") from error


def _check_left_open(kind: str, name: str, error: ValidationError) -> None:
    """Refuse words in capitals where numbers belong: a recipe leaves such to its reader."""
    words = {
        str(item["loc"][-1]): item["input"]
        for item in error.errors()
        if isinstance(item["input"], str)
        and item["input"].isupper()
        and item["type"].startswith(("float", "int"))
    }
    if words:
        given = " and ".join(f"{key} is {word}" for key, word in words.items())
        example = ", ".join(f"{key}: {value}" for key, value in zip(words, (-0.5, 1.5), strict=False))
        raise UserError(
            f"{kind} {name}: {given}, which the recipe leaves to you. Write numbers there, such as {example}."
        )
