"""Methods of papers as recipes over the shared parts: each a file of a few lines beside this one.

A file begins with comments: one line on the idea, the paper, and what the reader should know. The rest is what the
method is, at most ten lines; in a written recipe model and data, which are the reader's own, stand before it, and each
trained model gets a table of how it is trained.
"""

import difflib
from dataclasses import dataclass
from importlib.resources import files

from tokenward.errors import UserError

BEGINNING = """\
run: runs/{name}

model:
  name: default            # a folder or hub name

data:
  source: builtin          # a file, a folder or a hub name; docs/own_data.md says what it may hold
  eval: 0.1            # share of the prompts kept for the evaluation

tokens:
  max_prompt_tokens: 512
  max_response_tokens: 256
"""

TRAINING = """\
  training:                # any field of transformers.TrainingArguments
    learning_rate: 1.0e-5  # for a small model; 1.0e-6 and less from a billion weights up, or 1.0e-4 for an adapter
    per_device_train_batch_size: 8  # pairs; with gradient_accumulation_steps: 4 an update sees 32
    num_train_epochs: 1
"""
"""What is written into each of :data:`TRAINED`."""

TRAINED = ("oracle", "policy")
"""Tables of a method's body whose model is trained; an auxiliary model has its own table in the body."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the literature.

    Attributes:
        name: As ``tokenward init`` takes it.
        line: What it does.
        paper: Where it is from.
        notes: What the reader of its recipe should know.
        body: What the method is, as a part of a recipe.
    """

    name: str
    line: str
    paper: str
    notes: tuple[str, ...]
    body: str

    @property
    def recipe(self) -> str:
        """A whole recipe, with comments."""
        comments = "".join(f"# {text}\n" for text in (self.line, self.paper, *self.notes))
        return f"{comments}{BEGINNING.format(name=self.name)}\n{_with_training(self.body)}"


def _with_training(body: str) -> str:
    """A body whose trained models have a table of how they are trained, as the last of their own table."""
    tables: list[list[str]] = []
    for line in body.splitlines():
        if line.startswith(" "):
            tables[-1].append(line)
        else:
            tables.append(_opened(line))
    return "".join(
        "".join(f"{line}\n" for line in lines) + (TRAINING if lines[0].rstrip(":") in TRAINED else "")
        for lines in tables
    )


def _opened(line: str) -> list[str]:
    """A table of one line, ``oracle: {objective: {...}}``, as one with a line for each key; any other line as it is."""
    name, _, flow = line.partition(": ")
    if name not in TRAINED or not flow:
        return [line]
    items, depth = [""], 0
    for sign in flow.strip()[1:-1]:
        depth += (sign in "{[") - (sign in "}]")
        if sign == "," and not depth:
            items.append("")
        else:
            items[-1] += sign
    return [f"{name}:", *(f"  {item.strip()}" for item in items)]


def all_methods() -> dict[str, Method]:
    """Every method by name, in the alphabet's order."""
    found = (file for file in files(__name__).iterdir() if file.name.endswith(".yaml"))
    read = (_method(file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8")) for file in found)
    return {method.name: method for method in sorted(read, key=lambda method: method.name)}


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: there is none; the nearest are named.
    """
    known = all_methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"there is no method {name!r}. {hint}tokenward methods lists all.")
    return known[name]


def _method(name: str, text: str) -> Method:
    lines = text.splitlines()
    count = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    line, paper, *notes = (comment.removeprefix("# ") for comment in lines[:count])
    return Method(name, line, paper, tuple(notes), "\n".join(lines[count:]) + "\n")
