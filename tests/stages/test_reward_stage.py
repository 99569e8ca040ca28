"""A token reward learned from the ranks of comparisons, and its combinations with SePO's selection and TLM's objective."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokenward
from tests.stages.runs import lines, press_when, refusal, tables_of, write_lines
from tests.tiny import planted_rows, save_tiny
from tokenward.data.files import read_comparisons
from tokenward.data.split import fraction_places
from tokenward.evaluation.credit import credit_figures, known_response
from tokenward.models.reward import load_reward_model
from tokenward.scoring.reads import token_values
from tokenward.scoring.store import TokenStore
from tokenward.tokens.rows import keys_of
from tokenward.tokens.spans import ByteSpan
from tokenward.training.fit import Interrupted

RUN = Path("runs/quickstart")
REWARD = "scores.scorer={name: reward}"
TRAINING = "training: {max_steps: 4, learning_rate: 1.0e-3, per_device_train_batch_size: 4}"
SMALL = f"reward={{head: {{hidden: 16, gain: 0.5}}, {TRAINING}}}"


def run_of(recipe: Path, *changes: str, last: str = "scores"):
    return tokenward.run(recipe, [REWARD, SMALL, *changes], last=last, quiet=True)


def stages() -> set[str]:
    return {path.parent.name for path in RUN.glob("*/manifest.json")}


def test_stored_reward_is_the_trained_reward(tiny_workplace):
    """Trained on whole lists of three; used on the pairs of best and worst: one layout, one number (tlm.md, B2)."""
    run = run_of(tiny_workplace)
    assert stages() == {"data", "reference", "reward", "scores"}, "the scorer reads no oracle"
    facts = run.done("reward").facts
    assert (facts["steps"], facts["list_sizes"]) == (4, [3])
    assert (RUN / "reward" / "history.jsonl").is_file()
    model = load_reward_model(RUN / "reward" / "model", device="cpu")
    store = TokenStore(run.path("scores"))
    pairs = list(tables_of(run).train)
    values = token_values(model, list(pairs), precision="float32", tokens_per_batch=64)
    assert len(pairs) > 10
    for row, found in zip(pairs, values, strict=True):
        for key, mine in zip(keys_of(row.comparison), found, strict=True):
            torch.testing.assert_close(store[key].value("reward"), mine, rtol=0, atol=2e-6)


@pytest.mark.parametrize("unit", ["word", "spans"])
def test_stored_reward_is_one_number_per_unit(tiny_workplace, unit):
    run = run_of(tiny_workplace, f"reward.head.unit={unit}")
    record = json.loads((RUN / "reward" / "model" / "token_reward.json").read_text())
    assert record["unit"] == unit
    store = TokenStore(run.path("scores"))
    (row, *_) = list(tables_of(run).train)
    for key, text, spans in zip(
        keys_of(row.comparison), row.comparison.responses, row.comparison.spans, strict=True
    ):
        ((start, end, _),) = spans  # the planted word
        pieces = {
            "word": len(text.split()),
            "spans": 1 + (start > 0) + (end < len(text)),
        }[unit]
        values = store[key].value("reward")
        # Neighbours of one piece have one number; what closes the reply belongs to the last piece.
        assert int((values[1:] != values[:-1]).sum()) + 1 == pieces
        if unit == "spans":
            ends = torch.tensor(store[key].end)
            inside = (ends > start) & (ends <= end)
            assert len(set(values[inside].tolist())) == 1


def test_log_ratios_weigh_the_likelihood(tiny_workplace):
    """SePO's credit, TLM's use of it: log-ratios have both signs, so they are weighed by their exponential."""
    changes = [
        "policy.selection={name: soft, transform: exp}",
        "policy.objective={name: weighted_likelihood}",
    ]
    run = tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    assert stages() == {"data", "reference", "oracle", "scores", "policy"}, "nothing reads a reward"
    assert run.done("policy").facts["kept"] == {"chosen": 1.0, "rejected": 1.0}
    error = refusal(tiny_workplace, ["policy.selection={name: soft}", changes[1]], last="policy")
    assert "transform: exp" in str(error)


def test_fraction_of_lists_of_any_length_trains_one_reward(tiny_workplace):
    """A row of one response, or of one rank, is counted and left out."""
    rows = planted_rows(26)
    for number, row in enumerate(rows[2:]):
        for name, value in (("responses", f"table {number}"), ("scores", -2.0), ("spans", [])):
            row[name] = [*row[name], value][: 2 + number % 3]
    for name in ("responses", "scores", "spans"):
        rows[0][name] = rows[0][name][:1]
    rows[1]["scores"] = [1.0, 1.0, 1.0]
    write_lines("pairs.jsonl", rows)
    run = run_of(tiny_workplace, "reward.fraction=0.5", last="reward")
    counts = {"read": 26, "kept": 24, "fewer than two responses": 1, "all ranks tied": 1}
    assert run.done("data").facts["counts"] == counts
    train = list(read_comparisons(run.path("data") / "train.jsonl"))
    mine = fraction_places((row.key for row in train), 0.5, run.recipe.seed, "reward")
    facts = run.done("reward").facts
    assert (facts["rows"], facts["list_sizes"]) == (len(mine), [2, 3, 4])
    assert len(mine) < len(train)


def test_rewards_weigh_the_likelihood_and_are_evaluated_during_training(tiny_workplace, tiny_folder):
    changes = ["reward.training.eval_strategy=steps", "reward.training.eval_steps=2"]
    changes += ["eval_reward={fraction: 0.4, training: {max_steps: 1}}"]
    changes += ["policy.selection={name: soft}", "policy.objective={name: weighted_likelihood}"]
    run = run_of(tiny_workplace, *changes, last="policy")
    # The prompts of the eval reward model do not train the reward.
    sets = tables_of(run)
    assert run.done("reward").facts["rows"] == len({json.dumps(row.comparison.prompt) for row in sets.train})
    assert sets.eval_reward
    found = [entry for entry in lines(RUN / "reward" / "history.jsonl") if "eval_loss" in entry]
    assert [entry["step"] for entry in found] == [2, 4]
    assert all(0 <= entry["eval_rank/accuracy"] <= 1 for entry in found)
    after = load_file(RUN / "policy" / "model" / "model.safetensors")
    before = load_file(tiny_folder / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_interrupted_reward_resumes_to_the_same_bytes(tiny_workplace, monkeypatch):
    change = "model.packing=none"
    run_of(tiny_workplace, change, last="reward")
    names = ("model.safetensors", "token_reward_head.safetensors")
    whole = [(RUN / "reward" / "model" / name).read_bytes() for name in names]
    with monkeypatch.context() as patch:
        press_when(patch, lambda state: state.global_step == 2)
        with pytest.raises(Interrupted):
            run_of(tiny_workplace, change, "run=runs/other", last="reward")
    with monkeypatch.context() as patch:
        steps = press_when(patch, lambda state: False)
        run_of(tiny_workplace, change, "run=runs/other", last="reward")
    assert steps == [(4, 4)]
    other = [(Path("runs/other/reward/model") / name).read_bytes() for name in names]
    assert other == whole


@pytest.mark.parametrize("spans", [None, [[[0, 3, 1.0], [2, 4, 1.0]], [], []]])
def test_unit_spans_needs_spans_that_do_not_overlap(tiny_workplace, spans):
    write_lines("pairs.jsonl", [{**row, "spans": spans} for row in planted_rows(12)])
    message = str(refusal(tiny_workplace, [REWARD, SMALL, "reward.head.unit=spans"], last="reward"))
    assert ("pairs.jsonl:" if spans is None else "overlap") in message


def test_rewards_of_another_tokenizer_are_divided(tiny_workplace, tmp_path):
    other = save_tiny(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    changes = [REWARD, f"reward={{model: {other}, head: {{hidden: 4}}, {TRAINING}}}"]
    run = tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    assert run.done("scores").facts["token_coverage"]


def test_reward_learns_which_word_decides(tiny_workplace):
    """The planted words: a reply with good is better than one with bad, and the reward finds them."""
    write_lines("pairs.jsonl", planted_rows(60))
    head = "head: {hidden: 16, gain: 0.5}"
    training = "training: {max_steps: 60, learning_rate: 3.0e-3, per_device_train_batch_size: 8}"
    changes = ["data.eval=0.2", f"reward={{{head}, {training}}}"]
    changes += ["policy.training.max_steps=1"]
    run = tokenward.run(tiny_workplace, [REWARD, *changes], last="policy", quiet=True)
    store, known = TokenStore(run.path("scores")), []
    for pair in (row.comparison for row in tables_of(run).eval):
        for key, text, spans in zip(keys_of(pair), pair.responses, pair.spans, strict=True):
            record = store[key]
            tokens = [ByteSpan(*ends) for ends in zip(record.start, record.end, strict=True)]
            known.append(known_response(text, spans, tokens, {"reward": record.values["reward"]}))
    assert credit_figures(known, resamples=2)["credit/auroc/reward"].value > 0.7
    # TLM's credit, SePO's use of it.
    assert stages() == {"data", "reference", "reward", "scores", "policy"}
    assert 0.2 < run.done("policy").facts["kept"]["chosen"] <= 0.3
