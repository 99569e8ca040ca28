"""The whole run on the tiny model: every stage, what reruns, what is refused, what resumes."""

import hashlib
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokenward
from tests.pipeline.tools import plugin, tables_of
from tokenward.errors import UserError
from tokenward.scoring.store import TokenStore
from tokenward.stages.lists import carry_out
from tokenward.stages.tables import random_part
from tokenward.training.fit import Interrupted

RUN = Path("runs/quickstart")


def stamps() -> dict[str, str]:
    """When each stage was made: a stage that is skipped keeps its manifest."""
    return {
        path.parent.name: json.loads(path.read_text())["created"] + path.read_text()
        for path in RUN.glob("*/manifest.json")
    }


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
    samples = [json.loads(line) for line in (run / "evaluation" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == metrics["vader/change"]["n"] == 4


def test_only_selected_tokens_train(finished_run: Path) -> None:
    """The share of kept tokens in the log is the recipe's 30 %, rounded down per response but at least one."""
    history = [
        json.loads(line)
        for line in (finished_run / RUN / "policy" / "history.jsonl").read_text().splitlines()
    ]
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


def test_running_again_skips_everything(copied_run: Path) -> None:
    before = stamps()
    tokenward.run(copied_run, quiet=True)
    assert stamps() == before


def test_a_changed_setting_reruns_what_depends_on_it_and_comes_back_for_free(copied_run: Path) -> None:
    before = stamps()
    weights = digest(RUN / "policy" / "model" / "model.safetensors")
    tokenward.run(copied_run, ["policy.objective.gamma=1.0"], quiet=True)
    after = stamps()
    assert {name for name in before if before[name] != after[name]} == {"policy", "evaluation"}
    assert digest(RUN / "policy" / "model" / "model.safetensors") != weights
    tokenward.run(copied_run, quiet=True)
    assert stamps() == before
    assert digest(RUN / "policy" / "model" / "model.safetensors") == weights


def test_another_selection_does_not_score_again(copied_run: Path) -> None:
    before = stamps()
    tokenward.run(copied_run, ["policy.selection.chosen={fraction: 0.5}"], last="policy", quiet=True)
    after = stamps()
    assert {name for name in before if before[name] != after[name]} == {"policy"}


def test_same_seed_same_bytes_other_seed_other_weights(finished_run: Path, tiny_workplace: Path) -> None:
    tokenward.run(tiny_workplace, last="policy", quiet=True)
    for part in ("scores/tokens-00000.parquet", "policy/model/model.safetensors"):
        assert digest(RUN / part) == digest(finished_run / RUN / part), part
    tokenward.run(tiny_workplace, ["seed=1"], last="oracle", quiet=True)
    assert digest(RUN / "oracle/model/model.safetensors") != digest(
        finished_run / RUN / "oracle/model/model.safetensors"
    )


@pytest.mark.parametrize(
    "change",
    [
        "policy.selection={name: all}",
        "policy.selection={name: top_fraction, scope: dataset}",
        "policy.selection={name: top_fraction, scope: batch}",
        "policy.selection={name: top_fraction, chosen: {direction: random}, rejected: {direction: random}}",
        "policy.selection={name: threshold, above: -10.0, below: 10.0}",
        "policy.objective={name: simpo}",
        "policy.objective={name: dpo, beta: 0.5}",
        "policy.objective={name: sepo, profile: official}",
        "scores.scorer={name: surprisal}",
    ],
)
def test_each_choice_trains(copied_run: Path, change: str) -> None:
    before = load_file(RUN / "policy" / "model" / "model.safetensors")
    tokenward.run(copied_run, [change], last="policy", quiet=True)
    after = load_file(RUN / "policy" / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(bool(value.isfinite().all()) for value in after.values())


def test_sft_referee_and_adapter(tiny_workplace: Path) -> None:
    changes = [
        "sft={training: {max_steps: 2, learning_rate: 1.0e-3}}",
        "eval_reward={fraction: 0.3, training: {max_steps: 2, learning_rate: 1.0e-3}}",
        "model.adapter={r: 2, target_modules: [q_proj, v_proj]}",
    ]
    run = tokenward.run(tiny_workplace, changes, quiet=True)
    assert (RUN / "policy" / "model" / "adapter_model.safetensors").is_file()
    assert not (RUN / "policy" / "model" / "model.safetensors").exists()
    figures = tokenward.read_figures(run)
    assert 0 <= figures["eval_reward/win_rate"].value <= 1
    assert 0 <= figures["eval_reward/pairs_accuracy"].value <= 1


def test_the_referee_sees_no_pair_of_the_others(tiny_workplace: Path) -> None:

    run = tokenward.open_run(tiny_workplace, ["eval_reward={fraction: 0.4}"], quiet=True)
    carry_out(run, "data")
    sets = tables_of(run)
    prompts = [{json.dumps(row.comparison.prompt) for row in rows} for rows in sets[:3]]
    assert sets.eval_reward
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]


def test_scores_of_own_text_equal_those_of_the_store(tiny_oracle: Path) -> None:
    run = tokenward.open_run("recipes/quickstart.yaml", quiet=True)
    store = TokenStore(run.path("scores"))
    from tokenward.tokens.rows import response_key

    scorer = tokenward.TokenScorer.load(tiny_oracle)
    for pair in (row.comparison for row in tables_of(run).eval[:4]):
        for text in pair.responses:
            # float32 log-probabilities of about -5 depend on the batch's shape in the last bits
            record = store[response_key(pair.prompt, text)]
            found = scorer(pair.prompt, text)
            stored = record.value("oracle_logp") - record.value("reference_logp")
            assert torch.allclose(torch.tensor([token.score for token in found.tokens]), stored, atol=5e-6)
            assert "".join(token.text for token in found.tokens) == text


def test_scores_of_another_oracle_are_refused(copied_run: Path) -> None:
    run = tokenward.open_run(copied_run, ["oracle.training.max_steps=2"], quiet=True)
    carry_out(run, "oracle")
    with pytest.raises(UserError, match="oracle"):
        carry_out(run, "policy")


def test_a_policy_with_another_tokenizer_is_refused(copied_run: Path, tmp_path: Path) -> None:
    from tests.tiny import save_tiny

    other = save_tiny(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []  # the same vocabulary, other tokens
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="share a tokenizer"):
        tokenward.run(copied_run, [f"policy.model={other}"], last="policy", quiet=True)


def test_a_selection_that_keeps_nothing_is_an_error(copied_run: Path) -> None:
    with pytest.raises(UserError, match="keeps no token"):
        tokenward.run(
            copied_run, ["policy.selection={name: threshold, above: 1000.0}"], last="policy", quiet=True
        )


def test_interrupt_saves_and_the_next_run_ends_as_if_nothing_had_happened(
    finished_run: Path, tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenward.training.callbacks import ShowProgress

    plain = ShowProgress.on_step_end
    steps = []

    def press(self, args, state, control, **kwargs) -> None:
        steps.append(state.global_step)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(ShowProgress, "on_step_end", press)
    with pytest.raises(Interrupted, match="goes on from there"):
        tokenward.run(tiny_workplace, quiet=True)
    assert not (RUN / "oracle" / "model").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tiny_workplace.parent.parent)
    again = []
    monkeypatch.setattr(
        ShowProgress, "on_step_end", lambda self, args, state, control, **k: again.append(state.global_step)
    )
    tokenward.run(tiny_workplace, last="oracle", quiet=True)
    # The key was pressed after step 3 had been looked at, so step 4 was the last and was saved.
    assert again == [5, 6], "it goes on; it does not begin again"
    ours, theirs = (folder / "oracle/model/model.safetensors" for folder in (RUN, finished_run / RUN))
    assert digest(ours) == digest(theirs)
    assert not (RUN / "oracle" / "checkpoints").exists()


def test_own_scorer_selector_objective_and_metric(tiny_workplace: Path) -> None:
    Path("mylab.py").write_text(
        "import torch\n"
        "from tokenward.objectives import Losses, Needs\n"
        "from tokenward.ops.ragged import weighted_mean\n"
        "class Late:\n"
        "    reads = ()\n"
        "    def __call__(self, record):\n"
        "        return torch.arange(len(record.ids), dtype=torch.float32)\n"
        "class Soft:\n"
        "    scope = 'response'\n"
        "    def __init__(self, temperature=1.0):\n"
        "        self.temperature = temperature\n"
        "    def __call__(self, tokens):\n"
        "        return torch.sigmoid(tokens.scores / self.temperature)\n"
        "class Hinge:\n"
        "    needs = Needs(pairwise=True)\n"
        "    def __call__(self, logp, batch):\n"
        "        mean = weighted_mean(logp, batch.weights, batch.response, batch.responses)\n"
        "        return Losses(torch.relu(1 - mean[0::2] + mean[1::2]), {})\n"
        "def shout(prompts, completions, **columns):\n"
        "    return [float(text.isupper()) for text in completions]\n"
    )
    changes = [
        "scores.scorer={name: 'mylab:Late'}",
        "policy.selection={name: 'mylab:Soft', temperature: 2.0}",
        "policy.objective={name: 'mylab:Hinge'}",
        "evaluation.metrics=['mylab:shout']",
    ]
    run = tokenward.run(tiny_workplace, changes, quiet=True)
    assert not (RUN / "oracle").exists(), "the scorer reads no oracle, so none is trained"
    assert tokenward.read_figures(run)["mylab:shout/after"].n == 4


def test_oracle_and_referee_train_on_their_own_share(tiny_workplace: Path) -> None:

    changes = [
        "oracle.fraction=0.5",
        "eval_reward={fraction: 0.3, training: {max_steps: 1}}",
        "evaluation.prompts=1",
    ]
    run = tokenward.run(tiny_workplace, changes, quiet=True)
    sets = tables_of(run)
    assert (
        len(random_part(run, sets.train, run.recipe.oracle.fraction, "oracle"))
        < len(sets.train)
        != len(sets.eval_reward)
    )
    assert run.done("oracle").facts["rows"] == len(
        random_part(run, sets.train, run.recipe.oracle.fraction, "oracle")
    )
    assert run.done("eval_reward").facts["rows"] == len(sets.eval_reward)
    assert run.done("policy").facts["rows"] == len(sets.train)


def test_before_is_the_reference_and_after_is_the_policy(tiny_oracle: Path) -> None:
    from tokenward.tokens.rows import response_key

    run = tokenward.open_run("recipes/quickstart.yaml", quiet=True)
    store = TokenStore(run.path("reference"))
    means = [
        [store[response_key(pair.prompt, text)].value("reference_logp").mean() for text in pair.responses]
        for pair in (row.comparison for row in tables_of(run).eval)
    ]
    expected = sum(float(chosen - rejected) for chosen, rejected in means) / len(means)
    assert tokenward.read_figures(run)["likelihood/margin_before"].value == pytest.approx(expected, abs=1e-4)
