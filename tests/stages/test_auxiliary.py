"""Auxiliary models: trained like the oracle or used as they are, under another prompt, and read by scorers."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tokenward
from tests.models.plain import plain_logprobs
from tests.stages.runs import lines, plugin, refusal, tables_of, write_lines
from tests.tiny import CHATML, save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.scoring.join import with_scores
from tokenward.scoring.store import TokenStore
from tokenward.stages.auxiliary import scorer_of
from tokenward.tokens.encode import Limits, encode_one, prompted, with_prompt
from tokenward.tokens.rows import keys_of
from tokenward.tokens.template import Template
from tokenward.types import Comparison

RUN = Path("runs/quickstart")


def folders() -> set[str]:
    return {path.parent.name for path in RUN.glob("*/manifest.json")}


def stored() -> TokenStore:
    return TokenStore(RUN / "scores")


def train_rows(run) -> list:
    return list(tables_of(run).train)


def margin(store: TokenStore, rows: list, model: str) -> float:
    """Mean over pairs of the log-ratio of the preferred response less that of the other."""
    total = 0.0
    for row in rows:
        records = [store[key] for key in keys_of(row.comparison)]
        ratios = [float((r.value(f"{model}_logp") - r.value("reference_logp")).sum()) for r in records]
        total += ratios[0] - ratios[1]
    return total / len(rows)


def test_auxiliary_model_is_trained_like_the_oracle_with_swapped_labels(tiny_workplace: Path) -> None:
    """TIS-DPO's contrast: a model trained by DPO, and one trained on the same pairs with their labels swapped."""
    training = "{learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 6}"
    changes = [
        f"auxiliary_models={{worse: {{swap_labels: true, training: {training}}}, unread: {{training: {training}}}}}",
        "scores.scorer={name: log_ratio, numerator: oracle, denominator: worse}",
    ]
    run = tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    assert folders() == {"data", "reference", "oracle", "auxiliary-worse", "scores"}
    store, rows = stored(), train_rows(run)
    assert set(store[next(iter(store))].values) == {"reference_logp", "oracle_logp", "worse_logp"}
    assert margin(store, rows, "oracle") > 0.1
    assert margin(store, rows, "worse") < -0.1
    # The stored values are those of the saved model.
    model = load_model(str(RUN / "auxiliary-worse" / "model"), device="cpu")
    with torch.no_grad():
        expected = plain_logprobs(model.model, rows[:1]).split([len(ids) for ids in rows[0].responses])
    for key, values in zip(keys_of(rows[0].comparison), expected, strict=True):
        torch.testing.assert_close(store[key].value("worse_logp"), values, atol=1e-4, rtol=0)


def test_auxiliary_model_of_likelihood_trains_on_a_fraction_of_the_best_responses(
    tiny_workplace: Path,
) -> None:
    changes = [
        "auxiliary_models={good: {objective: {name: sft}, fraction: 0.5, adapter: {r: 2, target_modules: [q_proj]}, "
        "training: {learning_rate: 1.0e-2, max_steps: 8, per_device_train_batch_size: 4}}}",
        "scores.scorer={name: log_ratio, numerator: good}",
    ]
    run = tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    assert "oracle" not in folders()
    facts, rows = run.done("auxiliary-good").facts, train_rows(run)
    assert abs(facts["rows"] - len(rows) / 2) < len(rows) / 3
    assert facts["rows"] < len(rows)
    store = stored()
    chosen = [store[keys_of(row.comparison)[0]] for row in rows]
    assert np.mean([float((r.value("good_logp") - r.value("reference_logp")).mean()) for r in chosen]) > 0.01
    assert (RUN / "auxiliary-good" / "model" / "adapter_config.json").is_file()


def test_same_model_under_another_prompt_scores_the_same_tokens(tiny_workplace: Path) -> None:
    """T-REG's contrast: a better and a worse instruction; values belong to tokens by their place in the response."""
    changes = [
        'auxiliary_models={better: {prompt: "Be very good. {prompt}"}, worse: {prompt: "{prompt} Be bad."}}',
        "scores.scorer={name: log_ratio, numerator: better, denominator: worse}",
    ]
    run = tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    assert folders() == {"data", "reference", "scores"}
    before = run.done("scores")
    store, (row, *_) = stored(), train_rows(run)
    model = load_model(run.reference_model, device="cpu")
    content = row.comparison.prompt[-1]["content"]
    for name, text in (("better", f"Be very good. {content}"), ("worse", f"{content} Be bad.")):
        rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tiny_tokenizer()(rendered)["input_ids"]
        for key, ids in zip(keys_of(row.comparison), row.responses, strict=True):
            with torch.no_grad():
                logp = (
                    model.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                )
            expected = logp.gather(-1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(store[key].value(f"{name}_logp"), expected, atol=1e-4, rtol=0)
    changes[0] = changes[0].replace("Be bad", "Be worse")
    again = tokenward.run(tiny_workplace, changes, last="scores", quiet=True).done("scores")
    line = 'auxiliary_models.worse: "{prompt} Be bad." -> "{prompt} Be worse."'
    assert before.changes_to(again) == [line]


SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)


def test_only_the_last_user_turn_changes() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SYSTEM
    template = Template(tokenizer=tokenizer)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    row = Comparison(key="k", prompt=tuple(turns), responses=("the", "a cup"), ranks=(0, 1), source="f:1")
    encoded, _ = encode_one(row, template, Limits(999, 999))
    changed = prompted(encoded, template, "Well: {prompt}!", None)
    expected = tokenizer.decode(encoded.prompt).replace("user\nc<|im_end|>", "user\nWell: c!<|im_end|>")
    assert tokenizer.decode(changed.prompt) == expected
    assert expected.count("Be kind.") == 1
    assert changed.responses == encoded.responses
    with pytest.raises(UserError, match="20"):
        prompted(encoded, template, "{prompt}", 20)
    with pytest.raises(UserError, match="f:1"):
        with_prompt(({"role": "system", "content": "x"},), "{prompt}", "f:1")


def test_auxiliary_model_of_another_family_is_refused(tiny_workplace: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "other", tiny_gpt2())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder)
    changes = [f"auxiliary_models={{x: {{model: {folder}}}}}", "scores.scorer={name: rank, of: x}"]
    assert "tokenizer" in str(refusal(tiny_workplace, changes, last="scores"))


def test_scorer_that_compares_with_all_data_sees_all_rows(tiny_workplace: Path) -> None:
    cut = "{threshold: {at: mean, keep: above, scope: dataset}}"
    changes = [
        f"scores.scorer={{name: combine, parts: [{{scorer: {{name: probability}}, steps: [{cut}]}}]}}",
    ]
    run = tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    rows = with_scores(tables_of(run).train, scorer_of(run), stored())
    for side in (0, 1):
        logps = [stored()[keys_of(row.comparison)[side]].value("reference_logp") for row in rows]
        mean = float(torch.cat(logps).double().exp().mean())
        for row, logp in zip(rows, logps, strict=True):
            assert row.scores[side].tolist() == (logp.exp() >= mean).float().tolist()


def test_spans_of_the_data_and_of_a_file_reach_their_tokens(tiny_workplace: Path) -> None:
    rows = lines(Path("pairs.jsonl"))
    external = [
        {"prompt": row["prompt"], "response": text, "spans": [[s, e, 10 * v] for s, e, v in spans]}
        for row in rows[:-3]
        for text, spans in zip(row["responses"], row["spans"], strict=True)
    ]
    write_lines("mine.jsonl", external)
    parts = "[{scorer: {name: spans}}, {scorer: {name: external, file: mine.jsonl}}]"
    run = tokenward.run(
        tiny_workplace,
        [f"scores.scorer={{name: combine, parts: {parts}}}", "data.eval=0"],
        last="scores",
        quiet=True,
    )
    assert "file mine.jsonl" in run.done("scores").inputs
    missing = {row["prompt"] for row in rows[-3:]}
    for row in with_scores(tables_of(run).train, scorer_of(run), stored()):
        comparison = row.comparison
        for side in range(len(comparison.responses)):
            if comparison.prompt[-1]["content"] in missing:
                assert row.scores[side].isnan().all()
                continue
            record = stored()[keys_of(row.comparison)[side]]
            marks = [(*mark,) for mark in comparison.spans[side]]
            expected = [
                sum(11 * value for first, last, value in marks if begin < last and end > first)
                for begin, end in zip(record.start, record.end, strict=True)
            ]
            assert row.scores[side].tolist() == expected
            assert any(expected) == bool(marks)


def test_each_kind_of_value_has_its_own_name(tiny_workplace: Path) -> None:
    kinds = [
        "{name: entropy}",
        "{name: rank}",
        "{name: attention, layer: 0}",
        "{name: similarity, domain: [good]}",
    ]
    parts = ", ".join(f"{{scorer: {kind}}}" for kind in [*kinds, "{name: activation}"])
    changes = [f"scores.scorer={{name: combine, parts: [{parts}]}}"]
    tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    store = stored()
    names = set(store[next(iter(store))].values)
    assert {name.rsplit("_", 1)[0] for name in names if len(name.split("_")) == 3} == {
        "reference_attention",
        "reference_similarity",
    }
    assert {"reference_entropy", "reference_rank", "reference_activation", "reference_logp"} < names


VERIFIER = """
calls = []
def right(prompts, completions, references):
    calls.append(len(completions))
    return ["good" in text for text in completions]
"""


def test_critical_tokens_are_those_without_which_the_answer_is_wrong(tiny_workplace: Path) -> None:
    lab = plugin(VERIFIER)
    changes = [
        f"scores.scorer={{name: counterfactual, verifier: '{lab}:right', max_new_tokens: 3}}",
        "data.limit=6",
        "scores.shard_rows=1",
    ]
    run = tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    store, rows = stored(), train_rows(run)
    (name,) = set(store[next(iter(store))].values) - {"reference_logp"}
    tokenizer = tiny_tokenizer()
    model = tiny_llama()
    row = rows[0]
    good, bad = (store[key].value(name).tolist() for key in keys_of(row.comparison))
    assert np.isnan(bad).all(), "the verifier rejects it, so it has no scores"
    ids = row.responses[0]
    expected = []
    for at in range(len(ids)):
        before = row.prompt + ids[:at]
        with torch.no_grad():
            order = model(torch.tensor([before])).logits[0, -1].argsort(descending=True).tolist()
            tried = [token for token in order if token != ids[at]][:2]
            texts = []
            for token in tried:
                text = [*ids[:at], token]
                while text[-1] != tokenizer.eos_token_id and len(text) < at + 4:
                    text.append(int(model(torch.tensor([row.prompt + text])).logits[0, -1].argmax()))
                texts.append(tokenizer.decode(text, skip_special_tokens=True))
        expected.append(float(not any("good" in text for text in texts)))
    assert good == expected
    assert 0 < sum(expected) < len(expected)
    assert not (RUN / "scores" / "cache").exists()


def test_interrupted_search_for_critical_tokens_resumes(tiny_workplace: Path, monkeypatch) -> None:
    from tokenward.sampling import counterfactual

    lab = plugin(VERIFIER)
    changes = [
        f"scores.scorer={{name: counterfactual, verifier: '{lab}:right', max_new_tokens: 2}}",
        "data.limit=6",
    ]
    search = counterfactual.CriticalSearch
    plain, seen = search.critical, []

    def stops(self, row, place):
        if len(seen) == 3:
            raise KeyboardInterrupt
        return watched(self, row, place)

    def watched(self, row, place):
        seen.append(keys_of(row.comparison)[place])
        return plain(self, row, place)

    monkeypatch.setattr(search, "critical", stops)
    with pytest.raises(KeyboardInterrupt):
        tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    (cache,) = (RUN / "scores" / "cache").iterdir()
    with cache.open("a") as file:
        file.write('["half')  # a kill in the middle of a line
    monkeypatch.setattr(search, "critical", watched)
    tokenward.run(tiny_workplace, changes, last="scores", quiet=True)
    assert len(set(seen)) == len(seen) == len(stored()), "none is searched twice"


def test_scores_of_the_policy_are_computed_during_training(tiny_workplace: Path) -> None:
    """ConfPO reads the policy alone; Rho-1 a frozen model beside it, whose values travel with the rows."""
    below = "policy.selection={name: transform, steps: [{threshold: {at: mean, keep: below}}]}"
    confpo = ["scores.scorer={name: probability, of: policy}", below, "policy.objective={name: simpo}"]
    tokenward.run(tiny_workplace, confpo, last="policy", quiet=True)
    assert "oracle" not in folders()
    history = lines(RUN / "policy" / "history.jsonl")
    kept = [entry["kept/chosen"] for entry in history if "kept/chosen" in entry]
    assert kept
    assert all(0.2 < share < 0.9 for share in kept), kept
    rho = [
        "auxiliary_models={better: {prompt: 'Be good. {prompt}'}}",
        "scores.scorer={name: log_ratio, numerator: better, denominator: policy}",
        "policy.selection={name: transform, steps: [{top: {fraction: 0.6, scope: batch}}]}",
        "policy.objective={name: weighted_likelihood}",
        "policy.training.eval_strategy=steps",
        "policy.training.eval_steps=2",
    ]
    run = tokenward.run(tiny_workplace, rho, last="policy", quiet=True)
    assert run.done("policy").facts["steps"] == 4
