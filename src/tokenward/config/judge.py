"""The file of a judge: model, endpoint, prompt and prices."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from tokenward.config.base import Count, Positive, Settings, key
from tokenward.config.problems import refusal, show, unknown_keys, wrong_value
from tokenward.config.source import read_source
from tokenward.errors import UserError
from tokenward.hidden import hidden

_LEAST = "Write at least:\nurl: http://localhost:8000/v1\nmodel: NAME"

SYSTEM = "You compare two replies to the same request. You are fair, and you do not favour a reply for its length or its place."

PROMPT = """Request:
<request>
{prompt}
</request>

Reply A:
<reply_a>
{reply_a}
</reply_a>

Reply B:
<reply_b>
{reply_b}
</reply_b>

Which reply serves the request better? Give your reasons in at most three sentences. Then end with exactly one of these marks:
[[A]] if reply A is better, [[B]] if reply B is better, [[C]] if they are equally good."""

PLACES = ("prompt", "reply_a", "reply_b")
_Price = Annotated[float, Field(ge=0)]


class JudgeTable(Settings):
    """A judge behind an OpenAI-compatible endpoint."""

    url: str = key("Base address without /chat/completions, such as http://localhost:8000/v1.")
    model: str = key("Name of the model at the endpoint.")
    key_variable: str | None = key("Environment variable with the API key; null sends none.", None)
    system: str = key("System message; empty sends none.", SYSTEM)
    prompt: str = key("User message with {prompt}, {reply_a} and {reply_b}.", PROMPT)
    request: dict[str, Any] = key("Further fields of the request.", {"temperature": 0, "max_tokens": 512})
    parallel: Count = key("Number of concurrent requests.", 4)
    timeout: Positive = key("Seconds to wait for an answer.", 120.0)
    attempts: Count = key("Attempts before a request counts as failed.", 6)
    price_in: _Price = key("Price per million prompt tokens, in any currency.", 0.0)
    price_out: _Price = key("Price per million answer tokens, in the same currency.", 0.0)


def load_judge(path: str | Path) -> JudgeTable:
    """Read and check the file of a judge.

    Raises:
        UserError: the file is missing, its YAML is malformed, a key is unknown, a value is wrong or the prompt
            lacks a placeholder.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the judge's file {path} cannot be read: {error}. {_LEAST}", code="unreadable-file"
        ) from error
    values, numbers = read_source(text, str(path))

    def place(key: str) -> str:
        return f"{path}:{numbers[key]}"

    if not isinstance(values, dict):
        raise UserError(f"{path}: a judge is a table, got {show(values)}. {_LEAST}", code="not-a-table")
    hidden(values)  # from now on, no message shows its secrets
    if problems := [*unknown_keys(values, JudgeTable)]:
        raise refusal(problems, place)
    for name in ("url", "model"):
        if name not in values:
            raise UserError(f"{path}: the judge has no {name}. {_LEAST}", code="missing-key", key=name)
    try:
        judge = JudgeTable.model_validate(values)
    except ValidationError as error:
        keys = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors())
        problems = [wrong_value(key, values[key], JudgeTable.model_fields[key]) for key in keys]
        raise refusal(problems, place) from error
    _check(judge, path)
    return judge


def _check(judge: JudgeTable, path: str | Path) -> None:
    if not judge.url.startswith(("http://", "https://")):
        message = f"{path}: url is {judge.url!r}. It must begin with http:// or https://."
        raise UserError(message, code="bad-url", key="url")
    try:
        parts = urlsplit(judge.url)
    except ValueError as error:
        message = f"{path}: url is {show(judge.url)}, which is no address ({error}). Write one such as http://localhost:8000/v1."
        raise UserError(message, code="bad-url", key="url") from error
    if parts.username is not None or parts.password is not None or parts.query:
        # The value is not shown: it may hold a password.
        message = f"{path}: url holds a user name, a password or a query. Write the address alone, and the name of a variable with the key as key_variable."
        raise UserError(message, code="bad-url", key="url")
    for place in PLACES:
        if f"{{{place}}}" not in judge.prompt:
            names = ", ".join(f"{{{name}}}" for name in PLACES)
            message = f"{path}: the prompt has no {{{place}}}, so the judge would not see it. A prompt needs {names}."
            raise UserError(message, code="missing-placeholder", key="prompt")
    for field in ("model", "messages", "stream"):
        if field in judge.request:
            message = f"{path}: tokenward sets request.{field} itself. Remove it."
            raise UserError(message, code="reserved-key", key=f"request.{field}")
