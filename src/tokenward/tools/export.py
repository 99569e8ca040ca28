"""``tokenward export RUN FOLDER``: a plain model folder to give away, its adapter merged and checked, with a card."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel

from tokenward.artifacts import Manifest, read_manifest
from tokenward.display import Display, interval, rounded
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figures, load_figures
from tokenward.models.adapters import merged
from tokenward.models.loading import (
    TOLERANCE,
    LanguageModel,
    difference,
    load_model,
    next_log_probabilities,
    recorded,
)
from tokenward.tokens.template import Style
from tokenward.tools.finished import FinishedModel, finished_model, run_manifests
from tokenward.tools.run import quiet_libraries

CARD = """---
{{ card_data }}
---

# {{ name }}

Trained with tokenward {{ versions.tokenward }} from `{{ start }}`. \
{{ merged }}

**Licence: not stated here.** It depends on the model and the data that this one was made from; add it before you give the \
model on.

## Data

{{ data }}

## Figures

{{ figures }}

## Use

Prompts are written with {{ template }}. The same in lm-evaluation-harness:

```bash
{{ command }}
```

## Recipe

Settings of each stage, as it was run.

```yaml
{{ recipe }}```

## Versions

{{ listed }}
"""


class Exported(NamedTuple):
    """What :func:`export` did.

    Attributes:
        folder: The new model folder.
        difference: Largest difference of a log-probability between the trained model and the folder, nats.
        tolerance: What was allowed.
        merged: Whether there was an adapter to merge.
        from_training: Whether the trained model is the one that was in memory when the training ended; a run without
            that record has its saved folder instead.
    """

    folder: Path
    difference: float
    tolerance: float
    merged: bool
    from_training: bool


def export(target: str, folder: str | Path, *, display: Display | None = None) -> Exported:
    """Write a finished run's model as an ordinary Hugging Face folder with a model card.

    The folder appears only when the log-probabilities of the model read back from it match those that the trained model
    gave when its training ended, on some prompts, over the whole vocabulary.

    Args:
        target: Folder of a run, or of a stage that made a language model.
        folder: The new folder; it must not hold anything.
        display: Where the outcome is shown.

    Raises:
        UserError: the run is not finished, the folder is not empty, or the model cannot be a plain folder.
    """
    place = Path(folder).expanduser()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{folder} is there already and not empty. Name a new folder.")
    finished = finished_model(target)
    if finished.run is None:
        raise UserError(
            f"{target} is no run's, so there is no recipe and no data to write on its card. Name the folder of a run."
        )
    quiet_libraries()
    model = finished.load()
    if model.head_mlp is not None:
        raise UserError(
            f"{finished.name} is a network before a frozen model's head, which no plain model folder can hold. Load it with "
            "tokenward.models.loading.load_model."
        )
    scratch = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        written = _write(model, finished, scratch)
        (scratch / "README.md").write_text(
            model_card(finished, place.name, merged=written.merged), encoding="utf-8"
        )
        if place.exists():
            place.rmdir()
        scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = written._replace(folder=place)
    since = (
        "the end of the training"
        if found.from_training
        else "the saved folder, for want of a record of the training"
    )
    (display or Display()).line(
        f"{place}  {'adapter merged; ' if found.merged else ''}log-probabilities differ by {found.difference:.2g} nats at most "
        f"from {since} ({found.tolerance:g} allowed)"
    )
    return found


def _write(model: LanguageModel, finished: FinishedModel, folder: Path) -> Exported:
    """The weights and the tokenizer, read back and compared with what trained."""
    trained = recorded(Path(finished.name).parent)
    before = next_log_probabilities(model, model.template(finished.style)) if trained is None else trained
    adapted = isinstance(model.model, PeftModel)
    whole = merged(model.model, finished.name) if isinstance(model.model, PeftModel) else model.model
    cast(PreTrainedModel, whole).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    again = load_model(str(folder), dtype=dtype, device=str(model.device))
    found = difference(before, next_log_probabilities(again, again.template(finished.style)))
    if not found <= TOLERANCE[dtype]:
        raise UserError(
            f"the exported model is not the trained one: log-probabilities differ by up to {found:.3g} nats from those at the "
            f"end of the training, and {TOLERANCE[dtype]:g} are allowed in {dtype}. Nothing was written. Look whether the base "
            f"of {finished.name} is still what it was, and train again where it is not."
        )
    return Exported(folder, found, TOLERANCE[dtype], adapted, trained is not None)


def model_card(finished: FinishedModel, name: str, *, merged: bool) -> str:
    """The card of a run's model: recipe, data, figures with intervals, versions.

    Args:
        finished: The model.
        name: What it is called.
        merged: Whether an adapter was merged into it.
    """
    assert finished.run is not None
    manifests = _manifests(finished.run)
    evaluation = finished.run / "evaluation" / "metrics.json"
    stage = read_manifest(Path(finished.name).parent)
    hub = finished.start if finished.start is not None and not Path(finished.start).exists() else None
    command = f"lm_eval --model hf --model_args pretrained={name} --tasks ifeval"
    chat = finished.style.kind == "chat"
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            tags=["tokenward", "preference-alignment"],
            # The built-in model and one of a folder have no name that others could look up.
            base_model=hub if hub is not None and "/" in hub else None,
        ),
        template_str=CARD,
        name=name,
        start=finished.start if hub else Path(finished.start or "a model").name,
        merged="The adapter is merged into the weights." if merged else "Every weight was trained.",
        data=_data(manifests),
        figures=_figures(load_figures(evaluation) if evaluation.is_file() else {}),
        template=_written_with(finished.style),
        command=f"{command} --apply_chat_template" if chat else command,
        recipe=yaml.safe_dump(
            {manifest.stage: manifest.settings for manifest in manifests}, sort_keys=False, allow_unicode=True
        ),
        versions=stage.versions,
        listed=_table(["", "version"], [[key, value] for key, value in stage.versions.items()]),
    )
    return str(card)


def _written_with(style: Style) -> str:
    """How prompts are written, in words."""
    if style.kind == "plain":
        return "no template: the bare text"
    given = ", ".join(f"{name}={json.dumps(value)}" for name, value in style.variables.items())
    return f"the tokenizer's chat template{f' and {given}' if given else ''}"


def _manifests(run: Path) -> list[Manifest]:
    return list(run_manifests(run).values())


def _data(manifests: Sequence[Manifest]) -> str:
    """Counts and fingerprints of what went in."""
    for manifest in manifests:
        if manifest.stage in ("data", "examples"):
            counts = {**manifest.facts.get("counts", {}), **manifest.facts}
            rows = [[key, str(value)] for key, value in counts.items() if isinstance(value, int)]
            rows += [[f"fingerprint of {key}", value] for key, value in manifest.inputs.items()]
            return _table(["", "rows"], rows)
    return "The run reads labelled texts; see the recipe."


def _figures(figures: Figures) -> str:
    if not figures:
        return "The run was not evaluated."
    rows = [
        [
            name,
            rounded(figure.value, figure.value),
            interval(figure.low, figure.high, figure.n, figure.value),
            str(figure.n),
        ]
        for name, figure in figures.items()
    ]
    return "On held-out data, with 95 % bootstrap intervals.\n\n" + _table(
        ["figure", "value", "95 % interval", "n"], rows
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
