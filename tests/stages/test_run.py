"""Runs on comparisons with the tiny model: every stage, what runs again, what resumes, what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokenward
from tests.manifests import rewritten
from tests.stages.runs import lines, manifests, press_when, refusal, tables_of, write_lines
from tests.tiny import CHATML, planted_rows, save_tiny
from tokenward.artifacts import read_manifest
from tokenward.errors import UserError
from tokenward.scoring.store import TokenStore
from tokenward.stages.data import source_fingerprint
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
    history = lines(run / "policy" / "history.jsonl")
    # The recipe keeps 30 %, rounded down per response, but at least one token.
    assert all(0.2 < entry["kept/chosen"] <= 0.3 for entry in history if "kept/chosen" in entry)
    for stage in ("oracle", "policy"):
        displacement = json.loads((run / stage / "manifest.json").read_text())["facts"]["displacement"]
        assert displacement["lowest"] <= displacement["last"], stage
        assert (displacement["margin"], displacement["warned_at"]) == (0.5, None)


def test_changed_setting_reruns_what_depends_on_it_and_is_restored_when_changed_back(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenward.tokens.store.encode_parts", None)  # nothing is encoded again
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
    "policy.selection={name: top_fraction, scope: dataset}",
    "policy.selection={name: top_fraction, scope: batch}",
    "policy.selection={name: threshold, above: -10.0, below: 10.0}",
    "policy.objective={name: sepo, profile: official}",
]


def test_each_choice_trains(copied_run: Path, tiny_folder: Path) -> None:
    start = load_file(tiny_folder / "model.safetensors")
    short = "policy.training={learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 2}"
    for change in CHOICES:
        tokenward.run(copied_run, [change, short, "fixed_prompts=0"], last="policy", quiet=True)
        after = load_file(RUN / "policy" / "model" / "model.safetensors")
        assert any(not torch.equal(start[name], after[name]) for name in start), change
        assert all(bool(value.isfinite().all()) for value in after.values()), change


def test_sft_fractions_of_the_pairs_eval_reward_and_an_adapter(tiny_workplace: Path) -> None:
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
    assert tokenward.read_figures(run.folder) == figures
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


def test_scores_of_any_text_equal_those_of_the_store(tiny_oracle: Path) -> None:
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
    with pytest.raises(UserError, match="oracle") as caught:
        carry_out(run, "policy")
    assert caught.value.code == "changed-inputs"
    merges, template = save_tiny(tmp_path / "merges"), save_tiny(tmp_path / "template")
    tokenizer = json.loads((merges / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []  # the same vocabulary, other tokens
    (merges / "tokenizer.json").write_text(json.dumps(tokenizer))
    (template / "chat_template.jinja").write_text("You are kind. " + CHATML)
    for other in (merges, template):
        # The scores belong to other tokens than the policy's, until they are made again.
        tokenward.run(copied_run, last="scores", quiet=True)
        run = tokenward.open_run(copied_run, [f"policy.model={other}"], quiet=True)
        with pytest.raises(UserError, match=str(other)) as caught:
            carry_out(run, "policy")
        assert caught.value.code == "tokenizer-mismatch"
        run = tokenward.run(copied_run, [f"policy.model={other}"], last="policy", quiet=True)
        covered = read_manifest(run.path("scores")).facts["token_coverage"]
        assert (covered["text"], covered["scored"]) == (1.0, 1.0)
        assert (covered["segments"] > 0) == (other == merges)
    nothing = "policy.selection={name: threshold, above: 1000.0}"
    assert "no token" in str(refusal(copied_run, [nothing], last="policy"))


def test_interrupted_run_resumes_to_the_same_bytes(
    finished_run: Path, tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed gives the same bytes, and another one others."""
    with monkeypatch.context() as patch:
        press_when(patch, lambda state: state.global_step == 3)
        with pytest.raises(Interrupted):
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


def test_without_eval_rows_there_are_no_figures(tiny_workplace, capsys):
    short = [f"{stage}.training.max_steps=1" for stage in ("oracle", "policy")]
    run = tokenward.run(tiny_workplace, ["data.eval=0", "scores.scorer={name: random}", *short])
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing can be evaluated" in said
    assert "nothing was measured: there are no eval rows" in said
    assert tokenward.read_figures(run) == {}


def test_a_training_ends_with_the_figures_of_its_last_step(tiny_workplace, capsys):
    tokenward.run(tiny_workplace, ["oracle.training.max_steps=5"], last="oracle")
    [last] = [
        line for line in lines(RUN / "oracle" / "history.jsonl") if line["step"] == 5 and "loss" in line
    ]
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  oracle 5/5"))
    assert f"at step 5: loss {last['loss']:.3f}" in shown


def test_eval_rows_that_are_all_dropped_are_said(tiny_workplace, capsys):
    """Before the first training, and where the figures would stand."""
    write_lines(Path("held.jsonl"), [{"prompt": "word " * 200, "chosen": "good", "rejected": "bad"}])
    source = Path("pairs.jsonl").resolve()
    short = [f"{stage}.training.max_steps=1" for stage in ("oracle", "policy")]
    run = tokenward.run(tiny_workplace, [f"data={{source: {source}, eval: {{source: held.jsonl}}}}", *short])
    said = " ".join(capsys.readouterr().out.split())
    why = "no comparison is left after encoding 1 (dropped: prompt too long: 1). Raise max_prompt_tokens"
    assert said.index(why) < said.index("oracle 1/1")
    assert f"nothing was measured: no pair is evaluated. Of the eval rows, {why}" in said
    assert tokenward.read_figures(run) == {}


def test_incomplete_checkpoint_is_ignored(finished_run: Path, tiny_workplace: Path) -> None:
    torn = RUN / "oracle" / "checkpoints" / "checkpoint-99"
    tokenward.run(tiny_workplace, last="reference", quiet=True)
    run = tokenward.open_run(tiny_workplace, quiet=True)
    torn.mkdir(parents=True)  # as a kill during the write leaves it: no trainer_state.json
    (torn / "model.safetensors").write_bytes(b"torn")
    shutil.copy(finished_run / RUN / "oracle" / "manifest.json", RUN / "oracle" / "manifest.json")
    rewritten(RUN / "oracle", lambda manifest: manifest | {"complete": False})
    carry_out(run, "oracle")
    ours, theirs = (folder / "oracle/model/model.safetensors" for folder in (RUN, finished_run / RUN))
    assert ours.read_bytes() == theirs.read_bytes()


def test_interrupt_in_the_last_step_loses_nothing(tiny_workplace: Path, monkeypatch) -> None:
    press_when(monkeypatch, lambda state: state.global_step == state.max_steps)
    run = tokenward.run(tiny_workplace, ["oracle.training.max_steps=1"], last="oracle", quiet=True)
    assert run.done("oracle").complete


def test_evaluation_during_training_has_the_names_of_trl(tiny_workplace: Path) -> None:
    changes = [
        "policy.selection={name: top_fraction, scope: batch}",
        "policy.training={eval_strategy: steps, eval_steps: 2, max_steps: 2, per_device_train_batch_size: 4}",
    ]
    tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    history = lines(RUN / "policy" / "history.jsonl")
    found = next(entry for entry in history if "eval_loss" in entry)
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"} <= set(found)
    assert found["eval_kept/chosen"] == 1.0, "eval pairs are judged by every token"


def test_eval_reward_model_needs_pairs_and_leaves_some(tiny_workplace: Path) -> None:
    write_lines("pairs.jsonl", planted_rows(4))
    error = refusal(tiny_workplace, ["eval_reward={fraction: 0.001}"], last="reference")
    assert (error.code, error.key) == ("no-rows", "eval_reward.fraction")


def test_fingerprint_of_a_source_covers_files_behind_a_pattern(tiny_workplace: Path) -> None:
    for name in ("a", "b"):
        Path(f"many/{name}").mkdir(parents=True)
        shutil.copy("pairs.jsonl", f"many/{name}/train.jsonl")
    first = source_fingerprint("many/*/train.jsonl")
    write_lines("many/b/train.jsonl", planted_rows(30, seed=1))
    assert source_fingerprint("many/*/train.jsonl") != first


def test_pairs_with_a_small_gap_are_counted(tiny_workplace: Path) -> None:
    rows = planted_rows(20)
    for row in rows[:5]:
        row["scores"] = [0.1, 0.05, 0.0]
    write_lines("pairs.jsonl", rows)
    counts = tables_of(tokenward.open_run(tiny_workplace, ["data.min_gap=1.0"], quiet=True)).summed
    assert counts["comparisons without a pair: closer than data.min_gap"] == 5
    assert counts["kept"] == 15
    other = tokenward.open_run(tiny_workplace, ["data.min_gap=9.0"], quiet=True)
    with pytest.raises(UserError) as caught:
        tables_of(other)
    assert (caught.value.code, caught.value.key) == ("no-rows", "data.min_gap")
