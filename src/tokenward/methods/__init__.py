"""Methods of papers as short recipes, one YAML file per method in this folder.

A file starts with comments: one line on the idea, the paper, what the study of docs/choosing.md found, and notes. The rest is the
part of a recipe that makes up the method, at most ten lines. Model, data and evaluation are added when a recipe is written, and a training
table for each trained model.
"""

import difflib
import re
from dataclasses import dataclass
from importlib.resources import files

from tokenward.errors import UserError

ENDS = """\
# tokenward run {name}.yaml ends with the trained model in runs/{name}/policy/model, its figures in
# runs/{name}/evaluation/metrics.json and the report runs/{name}/report/index.html
"""

BEGINNING = """\
run: runs/{name}

model:
  name: default            # a folder or hub name

data:
  source: builtin          # a file, a folder or a hub name; docs/own_data.md says what it may hold
  eval: 0.1                # fraction of the prompts held out for evaluation

tokens:
  max_prompt_tokens: 512
  max_response_tokens: 256
  # template: plain        # for a model without a chat template
"""

ENDING = """\
evaluation:                # replies to held-out prompts, before and after; docs/evaluation.md says how a reward can judge them
  max_new_tokens: 256
  metrics: [distinct_2]    # also vader, or a function of your own as module:name
"""

TRAINING = """\
  training:                # any field of transformers.TrainingArguments
    learning_rate: 1.0e-5  # 1.0e-6 for billions of parameters, 3.0e-5 for a hundred million, 1.0e-4 for an adapter or a toy
    per_device_train_batch_size: 8  # pairs, or prompts to reply to; with gradient_accumulation_steps: 4 an update sees 32
    num_train_epochs: 1
"""

ONLINE_TRAINING = """\
  training:                # any field of transformers.TrainingArguments; updates and batch as where it was measured
    learning_rate: 1.0e-5  # 1.0e-6 for billions of parameters, 3.0e-5 for a hundred million, 1.0e-4 for an adapter or a toy
    per_device_train_batch_size: 64  # prompts, each with its replies
    max_steps: 128
    lr_scheduler_type: linear
"""

REWARD_TRAINING = """\
  training:
    learning_rate: 5.0e-5  # 1.0e-5 for billions of parameters, 2.0e-4 for a hundred million; the run warns if it learns nothing
    per_device_train_batch_size: 8
    num_train_epochs: 3
    lr_scheduler_type: linear
"""

RECOMMENDED = "tlm_rl"
"""The method with the highest reward at the same distance from the start, see docs/choosing.md."""

FOUND = "reward at the same distance from the start: "
VERDICTS = (
    "the baseline",
    "more than dpo",
    "no clear difference to dpo",
    "less than dpo",
    "stays near its start",
    "not measured",
)
"""What the study of docs/choosing.md found of a method: its reward at 2 and 5 nats, where the interval of the difference excludes 0."""

TRAINED = {"oracle:": TRAINING, "reward:": REWARD_TRAINING, "policy:": TRAINING}
"""Tables that get a training table, and which. Those of auxiliary models have one in the file."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a paper.

    Attributes:
        name: Its short name.
        line: What it does, in one line.
        paper: The paper.
        verdict: One of :data:`VERDICTS`.
        notes: Further comments for the reader of the recipe.
        body: The part of a recipe that makes up the method.
    """

    name: str
    line: str
    paper: str
    verdict: str
    notes: tuple[str, ...]
    body: str

    @property
    def recipe(self) -> str:
        """A whole recipe, with comments."""
        found = f"{FOUND}{self.verdict}, see docs/choosing.md"
        comments = "".join(f"# {text}\n" for text in (self.line, self.paper, found, *self.notes))
        return f"{comments}{ENDS.format(name=self.name)}{BEGINNING.format(name=self.name)}\n{_with_training(self.body)}\n{ENDING}"


def _with_training(body: str) -> str:
    """The body with a training table at the end of each trained model's table."""
    tables = re.split(r"^(?=\S)", body, flags=re.MULTILINE)  # before each top-level key
    return "".join(table + _training_of(table) for table in tables)


def _training_of(table: str) -> str:
    if "name: reinforce" in table:
        return ONLINE_TRAINING
    return TRAINED.get(table.split(maxsplit=1)[0], "") if table.strip() else ""


def all_methods() -> dict[str, Method]:
    """Every method by name, in alphabetical order."""
    found = sorted(
        (file for file in files(__name__).iterdir() if file.name.endswith(".yaml")),
        key=lambda file: file.name,
    )
    methods = (_method(file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8")) for file in found)
    return {method.name: method for method in methods}


def method_of(name: str) -> Method:
    """The method with a name.

    Raises:
        UserError: There is none; similar names are suggested.
    """
    known = all_methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Choose one of {', '.join(known)}."
        raise UserError(f"there is no method {name!r}. {hint}", code="unknown-name")
    return known[name]


def _method(name: str, text: str) -> Method:
    lines = text.splitlines()
    count = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    line, paper, found, *notes = (comment.removeprefix("# ") for comment in lines[:count])
    return Method(name, line, paper, found.removeprefix(FOUND), tuple(notes), "\n".join(lines[count:]) + "\n")
