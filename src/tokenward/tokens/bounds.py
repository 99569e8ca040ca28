"""Chat templates with a bound on their work: they come with a model, and may be written to take all time or memory.

transformers renders them in jinja's sandbox, which keeps them from files and from Python's internals, and bounds ``range`` to 100,000.
Loops in loops, recursion and texts that double are not bounded there. Here each render may do an amount of work that no chat template
comes near: characters that it makes or reads, and rounds of loops. Work is counted, not timed, so a template is refused on every
machine or on none, and in every thread and process.
"""

import re
import threading
from collections.abc import Callable, Mapping
from functools import wraps
from types import FunctionType, GeneratorType
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

MOST_WORK = 2**27
"""Characters that one conversation may cost a template."""

# What a round of a loop, a call of a macro and an item of a list cost, in characters.
_ROUND, _CALL, _ITEM = 256, 2048, 64
_MOST_NUMBER, _MOST_BITS = 100_000, 10_000
_MOST_SOURCE = 1_000_000
_WIDTH = re.compile(r"\d{6}|\*")
_GROWING = {"join", "indent", "wordwrap", "tojson", "center", "truncate", "urlize", "xmlattr", "expandtabs"}
_spent = threading.local()


class TooMuchWorkError(jinja2.TemplateRuntimeError):
    """A template did more work than any conversation needs."""


def _spend(work: int) -> None:
    _spent.work = getattr(_spent, "work", 0) + work
    if _spent.work > MOST_WORK:
        raise TooMuchWorkError(f"it does more work than {MOST_WORK:,} characters need")


def _weight(*values: Any) -> int:
    """Characters that some values have as text, about: parts that are shared count each time. No more than what is left is counted."""
    total, left, most = 0, list(values), MOST_WORK - getattr(_spent, "work", 0)
    while left and total <= most:
        value = left.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, int):
            total += value.bit_length() // 3
        elif isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
            total += _ITEM * len(value)
        elif isinstance(value, list | tuple | set):
            left += value
            total += _ITEM * len(value)
    return total + 1


def _check_numbers(values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MOST_NUMBER:
            raise TooMuchWorkError(
                f"it asks for a width or a number of {value!s:.20} places, and {_MOST_NUMBER:,} are allowed"
            )


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDTH.search(text):
        raise TooMuchWorkError(f"it formats with {text!r:.60}, whose width is not bounded")


def _spend_on(name: str, value: Any, others: list[Any]) -> None:
    """What a filter or a method costs."""
    _check_numbers(others)
    work = _weight(value, *others)
    if name == "replace" and isinstance(value, str) and len(others) > 1:
        work += value.count(str(others[0])) * len(str(others[1]))
    elif name in _GROWING:
        work *= 1 + sum(
            len(other) if isinstance(other, str) else other if isinstance(other, int) else 0
            for other in others
        )
    elif name in ("format", "format_map"):
        _check_format(value)
    elif name == "sum" and any(isinstance(other, list | tuple) for other in others):
        work *= len(value) if isinstance(value, list) else _MOST_NUMBER
    _spend(work)


class _Counted(dict[str, Any]):
    """Filters or tests, each of which spends what it costs."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        skipped = int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            first = [
                list(value) if isinstance(value, GeneratorType) else value
                for value in args[skipped : skipped + 1]
            ]
            _spend_on(name, first[0] if first else "", [*args[skipped + 1 :], *kwargs.values()])
            return function(*args[:skipped], *first, *args[skipped + 1 :], **kwargs)

        super().__setitem__(name, counted)


class _CountedTemplate(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        """The text; its parts are counted as they come."""
        _spent.work, found = 0, []
        context = self.new_context(dict(*args, **kwargs))
        try:
            for piece in self.root_render_func(context):
                _spend(len(piece))
                found.append(piece)
        except Exception:
            self.environment.handle_exception()
        return "".join(found)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with a bound on the work of one render.

    Raises:
        TooMuchWorkError: while a template is compiled or rendered.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    template_class = _CountedTemplate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, finalize=self.weighed)
        self.filters, self.tests = (self._counted(known) for known in (self.filters, self.tests))
        del self.globals["lipsum"]

    @staticmethod
    def _counted(known: Mapping[str, Any]) -> Any:
        found = _Counted()
        for name, function in known.items():
            found[name] = function
        return found

    def weighed(self, value: Any) -> Any:
        """The value, which is about to be written, compared or cut."""
        _spend(_weight(value))
        return value

    def entered(self, work: int) -> str:
        """Count one round of a loop, or one call of a macro."""
        _spend(work)
        return ""

    def concatenated(self, *parts: Any) -> str:
        """The parts as one text."""
        _spend(_weight(*parts))
        return "".join(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator that can make something large of something small."""
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if bits > _MOST_BITS:
                raise TooMuchWorkError(
                    f"it computes a number of {bits:,} bits, and {_MOST_BITS:,} are allowed"
                )
        elif operator == "*":
            texts = [value for value in (left, right) if isinstance(value, str | list | tuple)]
            times = [value for value in (left, right) if isinstance(value, int)]
            _spend(
                len(texts[0]) * max(times[0], 0) * (1 if isinstance(texts[0], str) else _ITEM)
                if texts and times
                else _weight(left, right)
            )
        elif operator == "%":
            _check_format(left)
            _spend(_weight(left, right))
        else:
            _spend(
                _weight(left, right)
                if isinstance(left, str | int)
                else _ITEM * sum(len(v) for v in (left, right) if isinstance(v, list | tuple))
            )
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a method or a function."""
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if owner is __self:
            return __obj(*args)
        others = [*args, *kwargs.values()]
        if isinstance(owner, str):
            _spend_on(method.__name__, owner, others)
            if method.__name__ == "join":
                _spend(len(owner) * _weight(*others))
        else:
            _spend(_weight(*others))
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _MOST_SOURCE:
            raise TooMuchWorkError(f"it has {len(source):,} characters, and {_MOST_SOURCE:,} are allowed")
        _spent.work = 0  # constants are computed while it is compiled
        return _counting(super()._parse(source, name, filename))


def _counting(tree: nodes.Template) -> nodes.Template:
    """Let each loop, macro, concatenation, comparison and slice of a template count its work."""
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        written = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        node.body.insert(
            0,
            nodes.ExprStmt(
                _call("entered", nodes.Const((_ROUND if isinstance(node, nodes.For) else _CALL) + written)),
                lineno=node.lineno,
            ),
        )
    for node in list(tree.find_all(nodes.Compare)):
        if not any(isinstance(side, nodes.Const) for side in (node.expr, *(one.expr for one in node.ops))):
            node.expr = _call("weighed", node.expr)
    for node in list(tree.find_all(nodes.Getitem)):
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("weighed", node.node)
    _replace_concatenations(tree)
    tree.set_environment(cast(Any, tree.environment))
    return tree


def _replace_concatenations(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_without_concatenation(item) for item in value])
        elif isinstance(value, nodes.Node):
            setattr(node, field, _without_concatenation(value))


def _without_concatenation(value: Any) -> Any:
    if isinstance(value, nodes.Node):
        _replace_concatenations(value)
        if isinstance(value, nodes.Concat):
            return _call("concatenated", *value.nodes)
    return value


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    line = args[0].lineno or 1
    return nodes.Call(
        nodes.EnvironmentAttribute(method, lineno=line), list(args), [], None, None, lineno=line
    )


def _with(function: Any, **names: Any) -> Any:
    """A copy of a function that finds other objects under some of the names of its module."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# transformers' own code, so that a conversation is written as it writes it, with the other sandbox.
_compile = _with(
    chat_template_utils._cached_compile_jinja_template, ImmutableSandboxedEnvironment=BoundedEnvironment
)
_compiled: dict[str, Any] = {}


def _compile_once(source: str) -> Any:
    if source not in _compiled:
        if len(_compiled) > 64:
            _compiled.clear()
        _compiled[source] = _compile(source)
    return _compiled[source]


_render = _with(chat_template_utils.render_jinja_template, _compile_jinja_template=_compile_once)
_apply = _with(PreTrainedTokenizerBase.apply_chat_template, render_jinja_template=_render)


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: Any, **settings: Any) -> Any:
    """As the tokenizer's own method, with a bound on the template's work. A tokenizer with a method of another class keeps that.

    Raises:
        TooMuchWorkError: the template does more.
        RecursionError: it calls itself without end.
    """
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return tokenizer.apply_chat_template(messages, **settings)
    return _apply(tokenizer, messages, **settings)
