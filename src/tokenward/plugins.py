"""Plugins: find a class or function by its short name or by ``"module:Name"`` and build it from a recipe's table."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel, ConfigDict, Strict, TypeAdapter, ValidationError, create_model
from pydantic_core import ErrorDetails, to_json

from tokenward.errors import UserError, refuse_masked
from tokenward.hidden import hidden
from tokenward.trl_names import trl_advice

T = TypeVar("T")

_CODE: dict[str, str] = {}
"""Fingerprint of each module's file when it was first looked up. A process imports a module only once, so later edits do
not change what the process computes."""


def build(kind: str, name: str, arguments: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """Build a plugin from its name and settings.

    A class is called with the settings. A function without settings is the plugin itself; with settings it is called
    and must return the plugin.

    Args:
        kind: What the plugin is, for messages: ``scorer``, ``objective`` and so on.
        name: A key of ``known``, or ``"module:Name"`` of a class or function.
        arguments: Settings by name.
        known: The built-in classes by name.

    Raises:
        UserError: The name or a setting is unknown, or a setting has the wrong type or value.
    """
    target = find(kind, name, known)
    refuse_masked(f"{kind} {name}", arguments)
    if inspect.isfunction(target):
        if not arguments:
            return target
        if _is_installed(_module_of(target)):
            raise UserError(
                f"{kind} {name} is a function of an installed package, which a recipe cannot call with settings; got "
                f"{', '.join(arguments)}. Write a class of your own that calls it.",
                code="not-a-plugin",
            )
        _check_factory(kind, name, arguments, target)
    _check_names(kind, name, arguments, target)
    if dataclasses.is_dataclass(target):
        return _validated(kind, name, arguments, target)
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{kind} {name} could not be built from {hidden(arguments)}: {error}", code="invalid-value"
        ) from error


def check_call(kind: str, name: str, plugin: Any, arguments: Sequence[str]) -> None:
    """Check that a plugin can be called with these positional arguments, before anything is computed for it.

    Raises:
        UserError: It is not callable, or its signature does not fit.
    """
    expected = f"It is called as f({', '.join(arguments)})."
    if not callable(plugin):
        raise UserError(
            f"{kind} {name} is {_with_article(type(plugin).__name__)}, which cannot be called. {expected} "
            "Add a __call__ method to the class.",
            code="not-callable",
        )
    try:
        signature = inspect.signature(plugin)
    except ValueError:  # functions written in C may have no signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{kind} {name} takes ({', '.join(signature.parameters)}): {error}. {expected}",
            code="wrong-signature",
        ) from error


def validated(settings: type[T]) -> type[T]:
    """Check the fields of a dataclass against their annotations whenever an object is created.

    Write it below ``@dataclass``. The check runs before the class's own ``__post_init__``, which can rely on the types.
    """
    own: Callable[[T], None] | None = getattr(settings, "__post_init__", None)

    def __post_init__(self: T) -> None:
        check_fields(self)
        if own is not None:
            own(self)

    settings.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return settings


def check_fields(settings: Any, names: tuple[str, ...] | None = None) -> None:
    """Check the fields of a dataclass instance against their annotations; ``names`` limits it to some of them.

    Raises:
        UserError: A value has the wrong type, or is none of the field's choices. An int is accepted for a float, and a
            list for a tuple.
    """
    names = names or tuple(field.name for field in dataclasses.fields(settings) if field.name[0] != "_")
    values = {name: _plain_number(getattr(settings, name)) for name in names}
    try:
        _model_of(type(settings), names).model_validate(values)
    except ValidationError as error:
        raise _refusal(f"{type(settings).__name__}: ", error.errors()[0]) from error


def check_argument(name: str, value: Any, annotation: Any) -> None:
    """Check an argument of a function against a type, such as a Literal; errors as in :func:`check_fields`."""
    try:
        _strict_model("Arguments", {name: annotation}).model_validate({name: value})
    except ValidationError as error:
        raise _refusal("", error.errors()[0]) from error


def check_positive(**settings: float) -> None:
    """Refuse settings, by name, that are not greater than 0."""
    for name, value in settings.items():
        if not value > 0:
            raise UserError(f"{name} must be greater than 0, got {value}.", code="out-of-range")


def check_fraction(name: str, value: float) -> None:
    """Refuse a fraction outside of (0, 1]."""
    if not 0 < value <= 1:
        raise UserError(f"{name} must be in (0, 1], got {value}. Write 0.3 for 30 %.", code="out-of-range")


def find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """The class or function behind a name; arguments and errors as in :func:`build`."""
    if name in known:
        return known[name]
    if ":" not in name:
        if not known:
            raise UserError(
                f'a {kind} must be a function given as "module:name", got {name!r}.', code="unknown-name"
            )
        raise UserError(
            f"there is no {kind} {name!r}. {_suggestion(name, known)}Choose one of {', '.join(known)}, or give "
            'a custom one as "module:Name".',
            code="unknown-name",
        )
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UserError(
            f'{kind} {name!r} is not the name of a class or function. Write "module:Name", such as "mine:Scorer" for the class Scorer '
            "in mine.py.",
            code="unknown-name",
        )
    _check_allowed(kind, name, module_name)
    target = _imported(kind, name, module_name, attribute)
    if not callable(target):
        raise UserError(
            f"{kind} {name!r} is {_with_article(type(target).__name__)}, which cannot be called. "
            f"Name a function{' or a class' if known else ''}.",
            code="not-callable",
        )
    _check_written_for(kind, name, target)
    return target


def _imported(kind: str, name: str, module_name: str, attribute: str) -> Any:
    # `python -m` puts the current folder on the path but the installed command does not. Plugins usually lie there.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UserError(
            f"{kind} {name!r}: the module {module_name!r} cannot be imported ({error}). It must be installed or lie "
            f"in the current folder {Path.cwd()}.",
            code="import-failed",
        ) from error
    except AttributeError as error:
        raise UserError(
            f"{kind} {name!r}: the module {module_name!r} has no {attribute!r}.", code="import-failed"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise UserError(
            f"{kind} {name!r}: importing the module {module_name!r} ends with {type(error).__name__}: {error}. Correct it first.",
            code="import-failed",
        ) from error


@contextmanager
def without_plugins(why: str) -> Iterator[None]:
    """A context in which no code from outside of this package is imported by its name.

    Args:
        why: Completes the sentence "it is not imported, because ...".
    """
    before = _REFUSED.set(why)
    try:
        yield
    finally:
        _REFUSED.reset(before)


def refusal_of(settings: Any) -> str:
    """Why a name in some settings would not be imported now; empty if there is none, or all would be."""
    return _REFUSED.get() if any(not _is_builtin(name) for name in _plugin_names(settings)) else ""


def plugin_files(settings: Any) -> dict[str, Path | None]:
    """The file behind every ``"module:Name"`` in some settings; None if it is none. No module is imported."""
    return {
        name: _found_file(name.partition(":")[0])
        for name in dict.fromkeys(_plugin_names(settings))
        if not _is_builtin(name)
    }


def _check_allowed(kind: str, name: str, module: str) -> None:
    """Refuse a name before its module is imported, which runs the module's code."""
    if why := _REFUSED.get():
        raise UserError(
            f"the {kind} {name!r} is code from outside of tokenward. It is not imported, because {why}.",
            code="plugins-refused",
        )
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(
            f"{name!r} is part of Python's standard library, which has no {kind}. Name a class or function that was written as one.",
            code="not-a-plugin",
        )


def _check_written_for(kind: str, name: str, target: Any) -> None:
    """Check the arguments of a plugin from an installed package, so that a recipe cannot call just any function of it.

    A file of the user's own is theirs to write; how it is called is checked by :func:`check_call`.
    """
    protocol = _PROTOCOLS.get(kind)
    if protocol is None or not _is_installed(_module_of(target)):
        return
    called = target.__call__ if inspect.isclass(target) and "__call__" in dir(target) else target
    try:
        names = [item for item in inspect.signature(called).parameters if item != "self"]
    except (TypeError, ValueError):
        names = []
    if (inspect.isclass(target) and called is target) or names[: len(protocol)] != list(protocol):
        raise UserError(
            f"{name!r} comes from an installed package and was not written as a {kind}, which is called as f({', '.join(protocol)}). Name a "
            f"{kind}, or write one of your own that calls it.",
            code="not-a-plugin",
        )


_REFUSED: ContextVar[str] = ContextVar("refused", default="")

_PROTOCOLS: dict[str, tuple[str, ...]] = {
    "scorer": ("record",),
    "selector": ("tokens",),
    "selection": ("tokens",),
    "objective": ("logp", "batch"),
    "step": ("scores", "owners"),
    "aggregate": ("rewards", "weights", "owner", "count"),
}
"""The arguments of plugins that a recipe builds with settings of its own. Metrics, sources and verifiers are called with texts."""


def _found_file(module: str) -> Path | None:
    """The file of a module, found without importing its parents."""
    parts = module.split(".")
    with contextlib.suppress(ImportError, ValueError):
        for folder in (str(Path.cwd()), *sys.path):
            place = Path(folder or ".").joinpath(*parts)
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file():
                    return file
    return None


def _module_of(target: Any) -> str:
    """The module of a class or function; what is written in C may have none, or an object of that name."""
    module = getattr(target, "__module__", None)
    return module if isinstance(module, str) else type(target).__module__


def _is_installed(module: str) -> bool:
    """Whether a module is this package's or an installed one, and not a file of the user's own."""
    if _is_builtin(module):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module not in sys.modules or module == "builtins"
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(Path(file).is_relative_to(place) for place in places if place)


def optional_package(module: str, user: str, extra: str) -> ModuleType:
    """Import a module that only an extra of this package installs.

    Args:
        module: Name of the module.
        user: What needs it, for the message.
        extra: The extra that installs it.

    Raises:
        UserError: The module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{user} needs {module}, which cannot be imported ({error}). It is part of the extra tokenward[{extra}].",
            code="missing-package",
        ) from error


def name_of(plugin: Any) -> str:
    """Name of a plugin for messages: ``module:Name`` if it is custom, else its class name or its settings."""
    target = plugin if inspect.isfunction(plugin) or inspect.isclass(plugin) else type(plugin)
    if _is_builtin(_module_of(target)):
        return str(plugin) if dataclasses.is_dataclass(plugin) else target.__qualname__
    return f"{_module_of(target)}:{target.__qualname__}"


def described(value: object) -> str:
    """The type of a value with its article, for messages: ``a Dataset``, ``the class DPO``, ``None``."""
    if value is None:
        return "None"
    return f"the class {value.__name__}" if inspect.isclass(value) else _with_article(type(value).__name__)


def code_fingerprints(settings: Any) -> dict[str, str]:
    """Fingerprint of the file behind every ``"module:Name"`` in a stage's settings, by ``"code of module:Name"``.

    Built-in plugins and modules that are not Python files are left out.
    """
    found = {name: _code_fingerprint(name.partition(":")[0]) for name in _plugin_names(settings)}
    return {f"code of {name}": digest for name, digest in found.items() if digest}


def _is_builtin(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _suggestion(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


def _plugin_names(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            yield value
        return
    if isinstance(value, Mapping):
        value = [*value, *value.values()]  # a custom step is named by its key
    for inner in value if isinstance(value, list | tuple) else ():
        yield from _plugin_names(inner)


def _code_fingerprint(module: str) -> str:
    if module not in _CODE:
        file = _source_file(module)
        if file is None or _is_builtin(module):
            return ""
        _CODE[module] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return _CODE[module]


def _source_file(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    # Text that only looks like a name, or a module built in memory by a test.
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _check_factory(kind: str, name: str, arguments: Mapping[str, Any], function: Any) -> None:
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{kind} {name} is a function, which is called as it is and has no settings; got {', '.join(arguments)}. "
            "Leave them out, or write a class that takes them in __init__ and does the work in __call__.",
            code="unknown-setting",
        ) from error


def _check_names(kind: str, name: str, arguments: Mapping[str, Any], target: Any) -> None:
    allowed = [key for key in inspect.signature(target).parameters if key != "_"]
    for key in arguments:
        if key not in allowed:
            raise UserError(
                f"{kind} {name} has no setting {key!r}. {_suggestion(key, allowed)}Its settings are: "
                f"{', '.join(allowed) or 'none'}. {trl_advice(key, recipe=True)}".rstrip(),
                code="unknown-setting",
            )


def _validated(kind: str, name: str, arguments: Mapping[str, Any], target: Any) -> Any:
    # Strict JSON is what a recipe means: a list is fine for a tuple and a table for a dataclass, but "4" is no number.
    written = to_json(dict(arguments), fallback=_written)
    try:
        return _adapter(target).validate_json(written, strict=True)
    except ValidationError as error:
        # The recipe of a method leaves some numbers to its reader, as words in capitals.
        placeholders = {
            str(item["loc"][-1]): item["input"]
            for item in error.errors()
            if isinstance(item["input"], str)
            and item["input"].isupper()
            and item["type"].startswith(("float", "int"))
        }
        if placeholders:
            given = " and ".join(f"{key} is {word}" for key, word in placeholders.items())
            example = ", ".join(
                f"{key}: {value}" for key, value in zip(placeholders, (-0.5, 1.5), strict=False)
            )
            raise UserError(
                f"{kind} {name}: {given}, a placeholder. Write a number instead, such as {example}.",
                code="placeholder",
            ) from error
        first = error.errors()[0]
        if first["type"] == "missing":
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{kind} {name} needs the setting {where}.", code="missing-setting") from error
        raise _refusal(f"{kind} {name}: ", first) from error


def _written(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else repr(value)


def _refusal(place: str, detail: ErrorDetails) -> UserError:
    where = ".".join(map(str, detail["loc"]))
    advice = detail["msg"].replace("Input should be", "It must be")
    if detail["type"] == "literal_error":
        advice = f"Choose {detail['ctx']['expected']}"  # type: ignore[typeddict-item]
    given = hidden({where: detail["input"]})[where]
    return UserError(f"{place}{where} is {given!r}. {advice}.", code="invalid-setting")


@cache
def _adapter(target: Any) -> TypeAdapter[Any]:
    return TypeAdapter(target)


@cache
def _model_of(settings: type, names: tuple[str, ...]) -> type[BaseModel]:
    # A subclass in a script may have annotations that cannot be resolved here; they are strings.
    types = {
        field.name: Any if isinstance(field.type, str) else _sequences_from_lists(field.type)
        for field in dataclasses.fields(settings)
        if field.name in names
    }
    return _strict_model(settings.__name__, types)


def _strict_model(name: str, types: Mapping[str, Any]) -> type[BaseModel]:
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    fields: dict[str, Any] = {name: (annotation, ...) for name, annotation in types.items()}
    return create_model(name, __config__=config, **fields)


def _sequences_from_lists(annotation: Any) -> Any:
    """The type with tuples and lists that can be given as each other; their elements stay strict."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return Union[tuple(map(_sequences_from_lists, get_args(annotation)))]  # noqa: UP007 - built from a tuple
    return Annotated[annotation, Strict(False)] if origin in (tuple, list) else annotation


def _plain_number(value: Any) -> Any:
    """A NumPy number as Python's, any other value as it is."""
    return value.item() if isinstance(value, np.generic) else value
