"""The whole run on the tiny model: every stage, what reruns, what is refused, what resumes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokenward
from tests.stages.runs import lines, manifests, plugin, press_when, tables_of
from tests.tiny import CHATML, save_tiny
from tokenward.errors import UserError
from tokenward.scoring.store import TokenStore
from tokenward.stages.lists import carry_out
from tokenward.stages.tables import random_part
from tokenward.tokens.rows import response_key
from tokenward.training.fit import Interrupted

RUN = Path("runs/quickstart")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_stage_leaves_its_folder_and_figures_have_intervals(finished_run: Path) -> None:
    run = finished_run / RUN
    assert {p.parent.name for p in run.glob("*/manifest.json")} == {
        "data", "reference", "oracle", "scores", "policy", "evaluation",
    }  # fmt: skip
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    for name in ("preference/accuracy", "logps/chosen_change", "kl/per_token", "vader/change", "length/after",
                 "credit/auroc/log_ratio", "credit/auroc/surprisal", "credit/auroc/random"):  # fmt: skip
        assert set(metrics[name]) == {"value", "low", "high", "n"}, name
        assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"], name
        assert metrics[name]["n"] > 0
    samples = lines(run / "evaluation" / "samples.jsonl")
    assert len(samples) == metrics["vader/change"]["n"] == 4


def test_only_selected_tokens_train(finished_run: Path) -> None:
    """The share of kept tokens in the log is the recipe's 30 %, rounded down per response but at least one."""
    history = lines(finished_run / RUN / "policy" / "history.jsonl")
    kept = [entry["kept/chosen"] for entry in history if "kept/chosen" in entry]
    assert kept
    assert all(0.2 < share <= 0.3 for share in kept)


def test_the_manifest_says_what_became_of_the_chosen_responses(finished_run: Path) -> None:
    for stage in ("oracle", "policy"):
        facts = json.loads((finished_run / RUN / stage / "manifest.json").read_text())["facts"]
        displacement = facts["displacement"]
        assert displacement["lowest"] <= displacement["last"], stage
        assert (displacement["margin"], displacement["warned_at"]) == (0.5, None)


UNLEARN = """
from tokenward.objectives import Losses, Needs, SePO


class Unlearn:
    needs = Needs(pairwise=True)

    def __call__(self, logp, batch):
        losses = SePO()(logp, batch)
        return Losses(-losses.loss, losses.metrics)
"""


def test_displacement_is_told_on_the_screen_and_in_the_manifest(copied_run: Path, capsys) -> None:
    changes = [
        f"policy.objective={{name: '{plugin(UNLEARN)}:Unlearn'}}",
        "policy.training={learning_rate: 5.0e-3, max_steps: 6, logging_steps: 1, displacement_margin: 0.1}",
    ]
    run = tokenward.run(copied_run, changes, last="policy")
    shown = " ".join(capsys.readouterr().out.split())
    at = run.done("policy").facts["displacement"]["warned_at"]
    assert f"warning, displacement: at update {at} the chosen responses are" in shown
    assert shown.count("warning, displacement") == 1


def test_a_changed_setting_reruns_what_depends_on_it_and_comes_back_for_free(copied_run: Path) -> None:
    model = RUN / "policy" / "model" / "model.safetensors"
    before, weights = manifests(RUN), digest(model)

    def changed(*changes: str, last: str = "evaluation") -> set[str]:
        tokenward.run(copied_run, list(changes), last=last, quiet=True)
        return {name for name in before if before[name] != manifests(RUN)[name]}

    assert changed() == set()
    assert changed("policy.objective.gamma=1.0") == {"policy", "evaluation"}
    assert digest(model) != weights
    assert changed() == set()
    assert digest(model) == weights
    assert changed("policy.selection.chosen={fraction: 0.5}", last="policy") == {"policy"}, "not scored again"


CHOICES = [
    "policy.selection={name: all}",
    "policy.selection={name: top_fraction, scope: dataset}",
    "policy.selection={name: top_fraction, scope: batch}",
    "policy.selection={name: top_fraction, chosen: {direction: random}, rejected: {direction: random}}",
    "policy.selection={name: threshold, above: -10.0, below: 10.0}",
    "policy.objective={name: simpo}",
    "policy.objective={name: dpo, beta: 0.5}",
    "policy.objective={name: sepo, profile: official}",
    "scores.scorer={name: surprisal}",
]


def test_each_choice_trains(copied_run: Path, tiny_folder: Path) -> None:
    start = load_file(tiny_folder / "model.safetensors")
    short = "policy.training={learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 2}"
    for change in CHOICES:
        tokenward.run(copied_run, [change, short, "fixed_prompts=0"], last="policy", quiet=True)
        after = load_file(RUN / "policy" / "model" / "model.safetensors")
        assert any(not torch.equal(start[name], after[name]) for name in start), change
        assert all(bool(value.isfinite().all()) for value in after.values()), change


def test_sft_shares_of_the_pairs_and_an_adapter(tiny_workplace: Path) -> None:
    changes = [
        "sft={training: {max_steps: 2, learning_rate: 1.0e-3}}",
        "oracle.fraction=0.5",
        "eval_reward={fraction: 0.3, training: {max_steps: 2, learning_rate: 1.0e-3}}",
        "model.adapter={r: 2, target_modules: [q_proj, v_proj]}",
    ]
    run = tokenward.run(tiny_workplace, changes, quiet=True)
    assert (RUN / "policy" / "model" / "adapter_model.safetensors").is_file()
    assert not (RUN / "policy" / "model" / "model.safetensors").exists()
    figures = tokenward.read_figures(run)
    assert 0 <= figures["eval_reward/win_rate"].value <= 1
    assert 0 <= figures["eval_reward/pairs_accuracy"].value <= 1
    sets = tables_of(run)
    oracle = random_part(run, sets.train, run.recipe.oracle.fraction, "oracle")
    rows = {stage: run.done(stage).facts["rows"] for stage in ("oracle", "eval_reward", "policy")}
    assert rows == {"oracle": len(oracle), "eval_reward": len(sets.eval_reward), "policy": len(sets.train)}
    assert 0 < len(oracle) < len(sets.train)
    prompts = [{json.dumps(row.comparison.prompt) for row in part} for part in sets[:3]]
    assert all(prompts)
    assert len(set.union(*prompts)) == sum(map(len, prompts)), "no part sees a prompt of another"


def test_scores_of_own_text_equal_those_of_the_store(tiny_oracle: Path) -> None:
    run = tokenward.open_run("recipes/quickstart.yaml", quiet=True)
    store = TokenStore(run.path("scores"))
    scorer = tokenward.TokenScorer.load(tiny_oracle)
    for pair in (row.comparison for row in tables_of(run).eval[:4]):
        for text in pair.responses:
            # float32 log-probabilities of about -5 depend on the batch's shape in the last bits
            record = store[response_key(pair.prompt, text)]
            found = scorer(pair.prompt, text)
            stored = record.value("oracle_logp") - record.value("reference_logp")
            assert torch.allclose(torch.tensor([token.score for token in found.tokens]), stored, atol=5e-6)
            assert "".join(token.text for token in found.tokens) == text


def test_stages_that_do_not_fit_together_are_refused(copied_run: Path, tmp_path: Path) -> None:
    run = tokenward.open_run(copied_run, ["oracle.training.max_steps=2"], quiet=True)
    carry_out(run, "oracle")
    with pytest.raises(UserError, match="oracle"):
        carry_out(run, "policy")
    merges, template = save_tiny(tmp_path / "merges"), save_tiny(tmp_path / "template")
    tokenizer = json.loads((merges / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []  # the same vocabulary, other tokens
    (merges / "tokenizer.json").write_text(json.dumps(tokenizer))
    (template / "chat_template.jinja").write_text("You are kind. " + CHATML)
    for other in (merges, template):
        with pytest.raises(UserError, match="another tokenizer or chat template"):
            tokenward.run(copied_run, [f"policy.model={other}"], last="policy", quiet=True)
    nothing = "policy.selection={name: threshold, above: 1000.0}"
    with pytest.raises(UserError, match="selects no token"):
        tokenward.run(copied_run, [nothing], last="policy", quiet=True)


def test_an_interrupt_saves_and_the_next_run_ends_as_if_nothing_had_happened(
    finished_run: Path, tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed gives the same bytes, and another one others."""
    with monkeypatch.context() as patch:
        press_when(patch, lambda state: state.global_step == 3)
        with pytest.raises(Interrupted, match="continues from there"):
            tokenward.run(tiny_workplace, quiet=True)
    assert not (RUN / "oracle" / "model").exists()
    with monkeypatch.context() as patch:
        steps = press_when(patch, lambda state: False)
        tokenward.run(tiny_workplace, last="policy", quiet=True)
    # The key was pressed after step 3 had been looked at, so step 4 was the last and was saved.
    assert [step for step, of in steps if of == 6] == [5, 6]
    parts = (
        "oracle/model/model.safetensors",
        "scores/tokens-00000.parquet",
        "policy/model/model.safetensors",
    )
    for part in parts:
        assert digest(RUN / part) == digest(finished_run / RUN / part), part
    assert not (RUN / "oracle" / "checkpoints").exists()
    tokenward.run(tiny_workplace, ["seed=1"], last="oracle", quiet=True)
    assert digest(RUN / parts[0]) != digest(finished_run / RUN / parts[0])


def test_before_is_the_reference_and_after_is_the_policy(tiny_oracle: Path) -> None:
    run = tokenward.open_run("recipes/quickstart.yaml", quiet=True)
    store = TokenStore(run.path("reference"))
    means = [
        [store[response_key(pair.prompt, text)].value("reference_logp").mean() for text in pair.responses]
        for pair in (row.comparison for row in tables_of(run).eval)
    ]
    expected = sum(float(chosen - rejected) for chosen, rejected in means) / len(means)
    assert tokenward.read_figures(run)["likelihood/margin_before"].value == pytest.approx(expected, abs=1e-4)
