"""Recipes of online runs on tiny models, and what their tests look at."""

import hashlib
import json
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest

import tokenward
from tokenward.stages.lists import carry_out
from tokenward.stages.run import Run
from tokenward.stages.tables import Tables, tables

# Adam divides a first gradient by its own size: where the parts of a gradient cancel to rounding, two processes would take steps that
# differ by a hundredth. Its epsilon is far above rounding here.
EXAMPLES = """
model: {{name: {model}}}
tokens: {{max_prompt_tokens: 128, max_response_tokens: 64}}
examples: {{source: examples.jsonl, prompt: "{{question}}", references: answers}}
reward: {{head: {{hidden: 16, gain: 0.5}}, training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, adam_epsilon: 1.0e-4}}}}
online:
  source: {{name: length, words: 3}}
  samples: 3
  reward_steps: 3
  development: 4
  reward_evals: 2
  every: 3
  rollouts: 3
  sampling: {{max_new_tokens: 6}}
  training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 2, max_steps: 6}}
evaluation: {{prompts: 3, max_new_tokens: 5, bootstrap: 20, metrics: [rouge1]}}
"""

PROMPTS = """
model: {{name: {model}, head_mlp: {{hidden: 16, gain: 0.1}}}}
prompt_task:
  train: train.tsv
  development: dev.tsv
  test: test.tsv
  verbalizers: [" a", " the"]
  candidates: 4
  best: 2
  random: 3
  manual: ["good tea"]
reward: {{head: {{hidden: 16, gain: 0.5}}, training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4}}}}
online:
  samples: 4
  reward_steps: 3
  development: 4
  reward_evals: 1
  every: 3
  evaluate_every: 3
  evaluation_samples: 2
  rollouts: 4
  sampling: {{max_new_tokens: 3}}
  objective: {{name: reinforce, entropy: 0.125}}
  training: {{learning_rate: 1.0e-2, max_steps: 6}}
evaluation: {{bootstrap: 20}}
"""

REINFORCE = "online.objective={name: reinforce}"
LOOKS = ("seed=2", "online.evaluate_every=2", "online.patience=9", "online.training.logging_steps=1")
"""Changes of the run that the tests share, whose best look is neither the first nor the last."""


def write_examples(path: Path, count: int = 30) -> None:
    """Questions with two answers each."""
    answers = ["the good tea on the table", "a good cup"]
    write_lines(path, ({"question": f"Say {n}.", "answers": answers, "level": n} for n in range(count)))


def write_labelled(folder: Path, count: int = 8) -> None:
    """Three files of texts with two labels."""
    for number, part in enumerate(("train", "dev", "test")):
        lines = [f"{'good' if i % 2 else 'bad'} tea {number} {i}\t{i % 2}" for i in range(count)]
        (folder / f"{part}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")


def online_recipe(folder: Path, model: Path, text: str = EXAMPLES) -> Path:
    """A folder with data and ``online.yaml``; returns the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    write_examples(folder / "examples.jsonl")
    write_labelled(folder)
    recipe = folder / "online.yaml"
    recipe.write_text(text.format(model=model))
    return recipe


def run_online(recipe: Path, *changes: str, last: str = "online", run: str = "online") -> Run:
    """Carry an online recipe out in a run folder of its own."""
    return tokenward.run(recipe, [f"run=runs/{run}", *changes], last=last, quiet=True)


def plugin(text: str) -> str:
    """Write a module of one's own into the current folder; its name is that of its text, so no test sees another's."""
    name = f"lab_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    Path(f"{name}.py").write_text(text)
    return name


def lines(path: Path) -> list[dict]:
    """A file of JSON lines, whose texts may hold other ends of a line."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def write_lines(path: Path | str, rows: Iterable[dict]) -> str:
    """Write a file of JSON lines; returns its name."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def manifests(folder: Path) -> dict[str, str]:
    """The manifest of each finished stage in a run's folder: one that is skipped keeps its own."""
    return {path.parent.name: path.read_text() for path in folder.glob("*/manifest.json")}


def folder_of(run: Run | Path) -> Path:
    """The folder of a run's online stage."""
    return run / "online" if isinstance(run, Path) else run.path("online")


def events(run: Run | Path) -> list[dict]:
    """What happened in the loop, without what depends on the clock."""
    found = lines(folder_of(run) / "events.jsonl")
    return [{key: value for key, value in event.items() if key != "seconds"} for event in found]


def digests(run: Run | Path) -> dict[str, str]:
    """Of every file of weights that the loop left."""
    folder = folder_of(run)
    files = [*folder.rglob("*.safetensors")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def press_when(monkeypatch: pytest.MonkeyPatch, due: Callable[[object], bool]) -> list[tuple[int, int]]:
    """Press Ctrl-C once, after the first step of any training for whose state it is due; returns (step, of) of all."""
    from tokenward.training.callbacks import ShowProgress

    plain, steps = ShowProgress.on_step_end, []

    def press(self, args, state, control, **kwargs) -> None:
        steps.append((state.global_step, state.max_steps))
        if due(state) and not press.done:
            press.done = True
            signal.raise_signal(signal.SIGINT)
        plain(self, args, state, control, **kwargs)

    press.done = False
    monkeypatch.setattr(ShowProgress, "on_step_end", press)
    return steps


def refusal(recipe: Path, changes: Sequence[str] = (), *, last: str = "") -> tokenward.UserError:
    """The error with which a run ends, or the opening of a recipe if ``last`` is empty."""
    begin = partial(tokenward.run, last=last) if last else tokenward.open_run
    with pytest.raises(tokenward.UserError) as caught:
        begin(recipe, list(changes), quiet=True)
    return caught.value


def tables_of(run: Run) -> Tables:
    """The run's pairs; the data stage is carried out if it is not there."""
    carry_out(run, "data")
    return tables(run, run.tokenizer_template(run.recipe.model.name))
