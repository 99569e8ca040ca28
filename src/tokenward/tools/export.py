"""``tokenward export RUN FOLDER``: a plain model folder with a card; an adapter is merged and checked."""

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

from tokenward.artifacts import Manifest, read_manifest, user_path
from tokenward.display import Display, interval, rounded
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figures, load_figures
from tokenward.hidden import hidden
from tokenward.models.adapters import merge_adapter
from tokenward.models.identity import check_places
from tokenward.models.loading import LanguageModel, load_model
from tokenward.models.record import TOLERANCE, difference, next_log_probabilities, recorded
from tokenward.tokens.template import Style
from tokenward.tools.finished import FinishedModel, finished_model, run_manifests
from tokenward.tools.run import quiet_libraries

CARD = """---
{{ card_data }}
---

# {{ name }}

Trained with tokenward {{ versions.tokenward }} from `{{ start }}`. {{ merged }}

**License: not stated here.** It depends on the base model and on the training data. Add it before you publish the model.

## Data

{{ data }}

## Figures

{{ figures }}

## Use

Prompts are written with {{ template }}. To evaluate the model with lm-evaluation-harness:

```bash
{{ command }}
```

## Recipe

The settings of each stage.

```yaml
{{ recipe }}```

## Versions

{{ listed }}
"""


class Exported(NamedTuple):
    """The result of :func:`export`.

    ``difference`` is the largest difference of a log-probability between the new folder and the trained model, in nats; the
    values of the trained model were recorded at the end of the training (``from_training``) or come from its saved folder.
    """

    folder: Path
    difference: float
    tolerance: float
    merged: bool
    from_training: bool


def export(target: str, folder: str | Path, *, display: Display | None = None) -> Exported:
    """Write the model of a finished run as a Hugging Face folder with a model card.

    The folder appears only if the model loaded from it gives the log-probabilities of the trained model, on a few prompts
    and over the whole vocabulary.

    Raises:
        UserError: the run has not finished, the folder is not empty, or the model has no plain form.
    """
    place = user_path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{folder} already exists and is not empty. Name a new folder.", code="file-exists")
    check_places(model=target)
    finished = finished_model(target)
    if finished.run is None:
        raise UserError(
            f"{target} is not part of a run, so there is no recipe for the model card. Name the folder of a run.",
            code="not-a-run",
        )
    quiet_libraries()
    model = finished.load()
    if model.head_mlp is not None:
        raise UserError(
            f"{finished.name} has a trained network between a frozen model and its head (model.head_mlp), and a plain model "
            "folder cannot hold that. Load it with tokenward.models.loading.load_model.",
            code="no-plain-form",
            key="model.head_mlp",
        )
    scratch = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        written = _write(model, finished, scratch)
        card = model_card(finished, place.name, merged=written.merged)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        if place.exists():
            place.rmdir()
        scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = written._replace(folder=place)
    origin = "the end of the training" if found.from_training else "the saved folder"
    (display or Display()).line(
        f"{place}  {'adapter merged; ' if found.merged else ''}log-probabilities differ from {origin} by at most "
        f"{found.difference:.2g} nats ({found.tolerance:g} allowed)"
    )
    return found


def _write(model: LanguageModel, finished: FinishedModel, folder: Path) -> Exported:
    """Write weights and tokenizer, load them again, and compare with the trained model."""
    trained = recorded(Path(finished.name).parent)
    before = next_log_probabilities(model, model.template(finished.style)) if trained is None else trained
    adapter = isinstance(model.model, PeftModel)
    whole = merge_adapter(model.model, finished.name) if isinstance(model.model, PeftModel) else model.model
    cast(PreTrainedModel, whole).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    again = load_model(str(folder), dtype=dtype, device=str(model.device))
    found = difference(before, next_log_probabilities(again, again.template(finished.style)))
    if not found <= TOLERANCE[dtype]:
        raise UserError(
            f"the exported model differs from the trained one: log-probabilities differ by up to {found:.3g} nats, and "
            f"{TOLERANCE[dtype]:g} are allowed in {dtype}. Nothing was written. Check that the base model of {finished.name} "
            "has not changed since the training; if it has, train again.",
            code="export-differs",
        )
    return Exported(folder, found, TOLERANCE[dtype], adapter, trained is not None)


def model_card(finished: FinishedModel, name: str, *, merged: bool) -> str:
    """The card of a run's model: recipe, data, figures with intervals, versions."""
    assert finished.run is not None
    manifests = list(run_manifests(finished.run).values())
    metrics = finished.run / "evaluation" / "metrics.json"
    versions = read_manifest(Path(finished.name).parent).versions
    hub = finished.start if finished.start is not None and not Path(finished.start).exists() else None
    chat = " --apply_chat_template" if finished.style.kind == "chat" else ""
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            tags=["tokenward", "preference-alignment"],
            # The built-in model and a local folder have no name that others could look up.
            base_model=hub if hub is not None and "/" in hub else None,
        ),
        template_str=CARD,
        name=name,
        start=finished.start if hub else Path(finished.start or "a model").name,
        merged="The adapter is merged into the weights." if merged else "All weights were trained.",
        data=_data(manifests),
        figures=_figures(load_figures(metrics) if metrics.is_file() else {}),
        template=_template_words(finished.style),
        command=f"lm_eval --model hf --model_args pretrained={name} --tasks ifeval{chat}",
        recipe=yaml.safe_dump(
            {manifest.stage: hidden(manifest.settings) for manifest in manifests},
            sort_keys=False,
            allow_unicode=True,
        ),
        versions=versions,
        listed=_table(["", "version"], [[key, value] for key, value in versions.items()]),
    )
    return str(card)


def _template_words(style: Style) -> str:
    if style.kind == "plain":
        return "no template, as plain text"
    variables = (f"{name}={json.dumps(value)}" for name, value in style.variables.items())
    return " and ".join(filter(None, ("the tokenizer's chat template", ", ".join(variables))))


def _data(manifests: Sequence[Manifest]) -> str:
    """Counts and fingerprints of the data."""
    for manifest in manifests:
        if manifest.stage in ("data", "examples"):
            counts = {**manifest.facts.get("counts", {}), **manifest.facts}
            rows = [[key, str(value)] for key, value in counts.items() if isinstance(value, int)]
            rows += [[f"fingerprint of {key}", value] for key, value in manifest.inputs.items()]
            return _table(["", "rows"], rows)
    return "The run trained on labelled texts; see the recipe."


def _figures(figures: Figures) -> str:
    if not figures:
        return "The run was not evaluated."
    rows = [
        [
            name,
            rounded(found.value, found.value),
            interval(found.low, found.high, found.n, found.value),
            str(found.n),
        ]
        for name, found in figures.items()
    ]
    table = _table(["figure", "value", "95 % interval", "n"], rows)
    return f"On the eval rows, with 95 % bootstrap intervals.\n\n{table}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
