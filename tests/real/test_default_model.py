"""One run on the real default model, cut short: it is the model that users meet first."""

import hashlib
import json
from pathlib import Path

import pytest

import tokenward
from tokenward.data.prepare import load
from tokenward.models.default import LAYERS, default_model_folder
from tokenward.models.loading import load_model, load_tokenizer
from tokenward.stages.data import BUILTIN
from tokenward.tokens.encode import Limits, encode
from tokenward.tokens.template import Template

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"


@pytest.mark.real
def test_the_quick_start_cut_short(tmp_path: Path) -> None:
    changes = [
        f"run={tmp_path / 'run'}",
        "data.limit=16",
        "data.eval=0.3",
        "tokens={max_prompt_tokens: 48, max_response_tokens: 16, too_long: truncate}",
        "oracle.training={max_steps: 2, per_device_train_batch_size: 2}",
        "policy.training={max_steps: 2, per_device_train_batch_size: 2}",
        "evaluation.prompts=4",
        "evaluation.max_new_tokens=4",
    ]
    run = tokenward.run(RECIPE, changes, quiet=True)
    figures = tokenward.read_figures(run)
    assert figures["vader/change"].n == 4
    history = [json.loads(line) for line in (run.path("oracle") / "history.jsonl").read_text().splitlines()]
    # Two steps from the reference: the loss has hardly left ln 2.
    assert history[-1]["train_loss"] == pytest.approx(0.6931, abs=0.05)


HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_test" / "test.jsonl.gz"


@pytest.mark.real
@pytest.mark.parametrize(
    ("source", "kept", "digest"),
    [(BUILTIN, 554, "5103c846e7d0c546"), (HH, 2302, "ce35974b411e5a5a")],
    ids=["builtin", "hh"],
)
def test_the_rows_are_those_that_the_figures_of_the_docs_were_made_with(source, kept, digest):
    if not source.is_file():
        pytest.skip(f"no {source.name} here")
    template = Template(tokenizer=load_tokenizer("default"))
    rows = encode(load(str(source)).comparisons, template, Limits(1024, 512))[0]
    content = hashlib.sha256()
    for row in rows:
        ids = [
            row.comparison.key,
            row.prompt,
            row.responses,
            [count > 0 for count in row.eos],
            list(row.comparison.ranks),
        ]
        content.update(json.dumps(ids).encode())
    assert (len(rows), content.hexdigest()[:16]) == (kept, digest)


@pytest.mark.real
def test_the_default_model_has_its_template_and_digits() -> None:
    """What the GGUF loses and the conversion restores."""
    model = load_model("default")
    template = Template(tokenizer=model.tokenizer)
    assert model.layout == "shared"
    assert model.model.config.num_hidden_layers == LAYERS
    assert model.tokenizer.convert_ids_to_tokens(template.eos_ids) == ["<|im_end|>"]
    # Digits stand alone, so the two line ends before them stay together; without the split they come apart.
    assert model.tokenizer.tokenize("\n\n12.") == ["ĊĊ", "1", "2", "."]
    assert (default_model_folder() / "model.safetensors").is_file()
