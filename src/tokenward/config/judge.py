"""The file of a judge: which model behind which address, what it is asked, what it costs."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from tokenward.config.base import Count, Table
from tokenward.config.problems import show, unknown_keys, wrong_value
from tokenward.config.source import read_source
from tokenward.errors import UserError

_LEAST = "url: http://localhost:8000/v1\nmodel: NAME"

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


class JudgeTable(Table):
    """A judge behind an OpenAI-compatible endpoint."""

    url: str = Field(
        description="Address to which /chat/completions is added, such as http://localhost:8000/v1."
    )
    model: str = Field(description="Name of the model, as the endpoint knows it.")
    key_variable: str | None = Field(
        default=None, description="Environment variable that holds the key; null sends none."
    )
    system: str = Field(default=SYSTEM, description="System message; empty sends none.")
    prompt: str = Field(
        default=PROMPT, description="User message with {prompt}, {reply_a} and {reply_b} in it."
    )
    request: dict[str, Any] = Field(
        default={"temperature": 0, "max_tokens": 512},
        description="Other fields of the request, sent as they are.",
    )
    parallel: Count = Field(default=4, description="Requests at once.")
    timeout: Annotated[float, Field(gt=0)] = Field(
        default=120.0, description="Seconds to wait for an answer."
    )
    attempts: Count = Field(default=6, description="Times a request is sent before it counts as failed.")
    price_in: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Price of a million tokens of prompts, in any currency."
    )
    price_out: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Price of a million tokens of answers, in the same currency."
    )


def load_judge(path: str | Path) -> JudgeTable:
    """Read and check the file of a judge.

    Raises:
        UserError: no such file, malformed YAML, an unknown key, a wrong value, or a prompt without one of its places.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the judge's file {path} cannot be read: {error}. Write a YAML file with at least:\n{_LEAST}"
        ) from error
    values, numbers = read_source(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a judge is a table, got {show(values)}. Write at least:\n{_LEAST}")
    problems = [
        f"{path}:{numbers[problem.key]}: {problem.message}" for problem in unknown_keys(values, JudgeTable)
    ]
    absent = [name for name in ("url", "model") if name not in values]
    if absent:
        problems.append(f"{path}: no {absent[0]}. Write at least:\n{_LEAST}")
    if problems:
        raise UserError("\n".join(problems))
    judge = _validated(values, numbers, path)
    _check(judge, path)
    return judge


def _validated(values: dict[str, Any], numbers: dict[str, int], path: str | Path) -> JudgeTable:
    try:
        return JudgeTable.model_validate(values)
    except ValidationError as error:
        keys = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors())
        problems = [wrong_value(key, values[key], JudgeTable.model_fields[key]) for key in keys]
        lines = [f"{path}:{numbers[problem.key]}: {problem.message}" for problem in problems]
        raise UserError("\n".join(lines)) from error


def _check(judge: JudgeTable, path: str | Path) -> None:
    if not judge.url.startswith(("http://", "https://")):
        raise UserError(f"{path}: url is {judge.url!r}. It must begin with http:// or https://.")
    for place in PLACES:
        if f"{{{place}}}" not in judge.prompt:
            raise UserError(
                f"{path}: the prompt has no {{{place}}}, so the judge would not see it. Write "
                f"{', '.join(f'{{{name}}}' for name in PLACES)} where each belongs."
            )
    taken = [field for field in ("model", "messages", "stream") if field in judge.request]
    if taken:
        raise UserError(f"{path}: request.{taken[0]} is set by tokenward itself. Leave it out.")
