"""Find an extension by its short name or by ``"module:Name"``, and build it from a recipe's table."""

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tokenward.errors import UserError


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
    if inspect.isfunction(target) and not arguments:
        return target
    _check_names(kind, name, arguments, target)
    if dataclasses.is_dataclass(target):
        return _validated(kind, name, arguments, target)
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind} {name} could not be made from {dict(arguments)}: {error}") from error


def find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """The class or function behind a name; see :func:`build`."""
    if name in known:
        return known[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
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
            f"{kind} {name!r} is a {type(target).__name__}, which cannot be called. Name a function or a class."
        )
    return target


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
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{kind} {name}: {where} is {first['input']!r}. {first['msg']}.") from error
