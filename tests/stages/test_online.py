"""Online runs on tiny models: the whole loop, seeds, resume, both objectives, both tasks, a T5."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.trainer_utils import SchedulerType

import tokenward
from tests.stages.runs import (
    LOOKS,
    REINFORCE,
    digests,
    events,
    folder_of,
    lines,
    manifests,
    online_recipe,
    press_when,
    run_online,
)
from tests.tiny import save_tiny, tiny_t5
from tokenward.artifacts import StageFolder
from tokenward.models.loading import load_model
from tokenward.models.reward import HEAD_FILE, load_reward_model
from tokenward.objectives import Reinforce, WeightedLikelihood
from tokenward.sampling import TransformersSampler
from tokenward.sampling.classification import ClassificationGap
from tokenward.scoring.reads import token_values
from tokenward.scoring.scorers import LogRatio
from tokenward.scoring.texts import TokenScorer
from tokenward.stages.lists import run_through
from tokenward.stages.online import OnlineLoop, fresh_reward
from tokenward.stages.reward_learning import RewardLearner
from tokenward.tokens.segments import with_segments
from tokenward.training.callbacks import EarlyStop, trained_weights
from tokenward.training.fit import Interrupted
from tokenward.training.trainer import TokenTrainer

TOTAL, REWARD_STEPS = 6, 3
RULES = {"precision": "float32", "tokens_per_batch": 8192}
ONCE = ("online.training.max_steps=1", "online.every=null")
LEARNING = (2, REWARD_STEPS)
"""A stop while the reward is learned."""
EARLY = [LEARNING, (2, TOTAL), (4, TOTAL)]
LATE = [(1, TOTAL), LEARNING]
"""Steps, of how many, after which Ctrl-C is pressed; the next step is the last. The reward is learned again after step 3."""


def moved(run, start: Path) -> float:
    """How far the policy's weights are from where they began."""
    before = load_file(start / "model.safetensors")
    after = load_file(folder_of(run) / "model" / "model.safetensors")
    return max(float((before[name] - after[name]).abs().max()) for name in before)


def stopped(monkeypatch, recipe: Path, stops: list, *changes: str, **more):
    """A run that is stopped several times, resumes each time and ends."""
    for stop in stops:
        with monkeypatch.context() as patch:
            press_when(patch, lambda s, stop=stop: (s.global_step, s.max_steps) == stop)
            with pytest.raises(Interrupted):
                run_online(recipe, *changes, run="stopped", **more)
        assert not Path("runs/stopped/online/model").exists()
    with monkeypatch.context() as patch:
        steps = press_when(patch, lambda state: False)
        run = run_online(recipe, *changes, run="stopped", **more)
    assert (1, TOTAL) not in steps
    return run


def same(one, other) -> None:
    assert digests(one) == digests(other) != {}
    assert events(one) == events(other)


def test_whole_run_on_examples(finished_online, tiny_folder):
    run = finished_online / "runs" / "online"
    assert set(manifests(run)) == {"examples", "online", "evaluation"}
    found = events(run)
    # Learned before the first update and after the third, until half of the six; looked at every second.
    assert [(e["event"], e["step"]) for e in found] == [
        ("policy", 0), ("reward", 0), ("policy", 2), ("reward", 3), ("policy", 4), ("policy", 6),
    ]  # fmt: skip
    rewards = [event for event in found if event["event"] == "reward"]
    assert [event["phase"] for event in rewards] == [0, 1]
    for event in rewards:
        # 3 steps of 4 groups of 3 replies, the tied ones dropped; two development examples.
        assert event["groups"] + event.get("dropped", {}).get("dropped: all responses tied", 0) == 12
        assert event["groups"] > 0
        assert event["steps"] == REWARD_STEPS
        assert event["best_step"] in (1, 2, 3)
        assert math.isfinite(event["loss"] + event["development_loss"] + event["sample_score"])
        assert 0 <= event["development_accuracy"] <= 1
    facts = json.loads(manifests(run)["online"])["facts"]
    assert (facts["steps"], facts["rewards_learned"]) == (TOTAL, 2)
    looks = {event["step"]: event["score"] for event in found if event["event"] == "policy"}
    assert facts["best_step"] == max(looks, key=lambda step: (looks[step], -step))
    figures = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert {"references/logp_per_token/change", "rouge1/after", "length/before", "ended/change"} <= set(
        figures
    )
    samples = lines(run / "evaluation" / "samples.jsonl")
    assert len(samples) == figures["rouge1/after"]["n"] > 0
    assert set(samples[0]["values"]) == {"rouge1", "length", "ended"}
    assert samples[0]["references"] == ["the good tea on the table", "a good cup"]
    # The reward is an ordinary folder, and not the one that it began as.
    reward = load_reward_model(run / "online" / "reward", device="cpu")
    AutoModel.from_pretrained(run / "online" / "reward")
    start = load_file(tiny_folder / "model.safetensors")
    mine = reward.model.backbone.state_dict()
    assert not torch.equal(mine["embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert not (run / "online" / "checkpoints").exists()
    assert moved(run, tiny_folder) > 1e-4


def test_finished_stages_are_skipped_and_changed_settings_rerun(copied_online):
    folder = Path("runs/online")

    def changed(*changes: str, last: str = "evaluation") -> set[str]:
        run_online(copied_online, *LOOKS, *changes, last=last)
        return {name for name in before if before[name] != manifests(folder)[name]}

    before = manifests(folder)
    assert changed() == set()
    assert changed("online.samples=2", last="online") == {"online"}
    assert changed() == set(), "what was kept comes back"
    assert changed("evaluation.prompts=1") == {"evaluation"}
    files = digests(folder)
    other = digests(run_online(copied_online, *LOOKS, "seed=1", run="other"))
    assert all(other[name] != digest for name, digest in files.items())


def test_resumed_run_equals_an_uninterrupted_one(recipe, finished_online, monkeypatch):
    whole = finished_online / "runs" / "online"
    assert set(digests(whole)) == {
        "model/model.safetensors", "reward/model.safetensors", "reward/token_reward_head.safetensors", "trained.safetensors",
    }  # fmt: skip
    again = stopped(monkeypatch, recipe, EARLY, *LOOKS, last="evaluation")
    same(again, whole)
    metrics = [folder / "evaluation" / "metrics.json" for folder in (again.folder, whole)]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        (["online.restart=fresh"], LATE),
        (
            ["online.objective={name: reinforce, kl: 0.1}", "online.training.bf16=true"],
            [LEARNING, (3, TOTAL)],
        ),
    ],
)
def test_resumed_run_with_other_choices_equals_an_uninterrupted_one(
    recipe, finished_online, monkeypatch, changes, stops
):
    whole = run_online(recipe, *LOOKS, *changes, run="whole")
    same(stopped(monkeypatch, recipe, stops, *LOOKS, *changes), whole)
    if changes == [
        "online.restart=fresh"
    ]:  # The first reward is that of a warm run; the second begins elsewhere.
        warm, fresh = events(finished_online / "runs" / "online"), events(whole)
        assert warm[1] == fresh[1]
        assert warm[3] != fresh[3]


def test_patience_stops_early_and_restores_the_best(recipe, tiny_folder):
    """Neither changes, so no look at them is better than the first."""
    changes = ["online.evaluate_every=1", "online.patience=2", "online.training.learning_rate=0.0"]
    changes += ["reward.training.learning_rate=0.0", "online.reward_evals=3", "online.reward_patience=1"]
    run = run_online(recipe, *changes)
    assert [(e["event"], e["step"]) for e in events(run)] == [
        ("policy", 0), ("reward", 0), ("policy", 1), ("policy", 2), ("stop", 2),
    ]  # fmt: skip
    facts = run.done("online").facts
    assert (facts["steps"], facts["best_step"]) == (2, 0)
    assert moved(run, tiny_folder) == 0
    assert [(e["steps"], e["best_step"]) for e in events(run) if e["event"] == "reward"] == [(2, 1)]
    reward = load_reward_model(run.path("online") / "reward", device="cpu")
    start = fresh_reward(run).model.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in reward.model.state_dict().items())


def test_every_sample_has_its_own_seed(recipe, monkeypatch):
    """Each micro-batch of each update, each time the reward is learned; only looks at the policy repeat theirs."""
    plain, calls = TransformersSampler.__call__, []

    def call(self, prompts, *, count, seed, progress=None):
        found = plain(self, prompts, count=count, seed=seed, progress=progress)
        calls.append((list(prompts), count, seed, found))
        return found

    monkeypatch.setattr(TransformersSampler, "__call__", call)
    changes = [
        "online.training.gradient_accumulation_steps=2",
        "online.training.max_steps=4",
        "online.every=2",
    ]
    run = run_online(recipe, REINFORCE, *changes, "online.evaluate_every=2", "online.evaluation_samples=2")
    rollouts = [(prompts, seed) for prompts, count, seed, _ in calls if len(prompts) in (2, 4) and count == 3]
    learning = [seed for prompts, count, seed, _ in calls if len(prompts) == 12]
    assert len(learning) == len(set(learning)) == 2
    # 4 updates, whose 2 micro-batches draw together, and twice the two development examples for the reward.
    assert sorted(len(prompts) for prompts, _ in rollouts) == [2] * 2 + [4] * 4
    assert len({seed for _, seed in rollouts}) == 6
    looks = [(seed, replies) for _, count, seed, replies in calls if count == 2]
    assert len(looks) == 3
    assert len({seed for seed, _ in looks}) == 1
    scores = [
        sum(-abs(len(reply.text.split()) - 3) for group in groups for reply in group) / sum(map(len, groups))
        for _, groups in looks
    ]
    assert [e["score"] for e in events(run) if e["event"] == "policy"] == pytest.approx(scores)


def prepared(run, *, moved: float = 1.0):
    """A few of a run's rows as they train, with what made them; the policy may have moved from its start."""
    run_through(run, "examples")
    objective = Reinforce(kl=0.1) if run.online.objective.name == "reinforce" else WeightedLikelihood()
    loop = OnlineLoop(run, StageFolder(run.folder, None), objective)
    prepare = loop.prepare()
    with torch.no_grad():
        for weight in loop.policy.model.parameters():
            weight.mul_(moved)
    given = loop.task.rows[:2]
    return prepare(given, 0), given, loop.learned or loop.rewards, loop.policy


def test_likelihood_of_the_first_reference_is_weighted_by_rewards(recipe):
    found, given, reward, policy = prepared(tokenward.open_run(recipe, quiet=True))
    rewards = token_values(reward, given, **RULES)
    for row, plain, mine in zip(found, given, rewards, strict=True):
        assert row.comparison.responses == ("the good tea on the table",)
        assert row.responses[0][-1] == policy.tokenizer.eos_token_id
        assert replace(row, scores=None, weights=None) == plain
        assert torch.equal(row.scores[0], mine[0])
        # w_t = r_t / sum r, in units of 1 / T
        torch.testing.assert_close(row.weights[0], mine[0] / mine[0].mean(), rtol=1e-5, atol=0)


def test_reinforce_trains_on_samples_with_the_start_as_reference(recipe):
    """Not on written responses, and not with the policy of now as its reference."""
    run = tokenward.open_run(recipe, [REINFORCE], quiet=True)
    found, given, reward, policy = prepared(run, moved=1.2)
    assert [row.responses for row in given] == [[], []]
    plain = [replace(row, scores=None, reference_logp=None) for row in found]
    models = (reward, run.load(run.start_model), policy)
    for row, mine, first, last in zip(
        found, *(token_values(model, plain, **RULES) for model in models), strict=True
    ):
        assert len(row.responses) == 3
        assert row.weights is None
        assert all(torch.equal(a, b) for a, b in zip(row.scores, mine, strict=True))
        for values, then, later in zip(row.reference_logp, first, last, strict=True):
            torch.testing.assert_close(values, then, rtol=0, atol=1e-5)
            assert float((values - later).abs().max()) > 1e-2


def test_unit_word_gives_every_token_of_a_word_one_reward(recipe):
    run = tokenward.open_run(recipe, ["reward.head.unit=word"], quiet=True)
    found = prepared(run)[0]
    # "the", " good" (2), " tea" (4), " on" (3), " the" (1), " table" and what closes it
    values = found[0].scores[0]
    sizes = [1, 2, 4, 3, 1, 7]
    assert sum(sizes) == len(values)
    for word in values.split(sizes):
        torch.testing.assert_close(word, word[:1].expand_as(word), rtol=0, atol=1e-6)
    assert len(set(values.tolist())) == len(sizes)
    assert found[0].segments is None


def test_plain_likelihood_learns_no_reward(recipe):
    run = run_online(
        recipe, "online.selection={name: all}", "online.evaluate_every=3", "online.training.max_steps=1"
    )
    assert {event["event"] for event in events(run)} == {"policy"}
    assert not (run.path("online") / "reward").exists()
    assert run.done("online").facts["rewards_learned"] == 0


def without_learning(recipe: Path) -> str:
    """A recipe without the keys that learn a reward."""
    keys = "source|samples|reward_steps|reward_evals|every"
    return re.sub(rf"(?m)^reward: .*\n|^  ({keys}): .*\n", "", recipe.read_text())


def test_reward_that_was_learned_before_is_used_as_it_is(recipe, finished_online, tiny_folder):
    learned = finished_online / "runs" / "online" / "online" / "reward"
    recipe.write_text(without_learning(recipe))
    before = {file.name: file.read_bytes() for file in learned.iterdir()}
    changes = [f"online.reward={learned}", REINFORCE, "online.training.max_steps=2"]
    run = run_online(recipe, *changes)
    assert events(run) == []
    assert moved(run, tiny_folder) > 1e-4
    assert run.done("online").facts["rewards_learned"] == 0
    assert not (run.path("online") / "reward").exists()
    assert before == {file.name: file.read_bytes() for file in learned.iterdir()}
    # The rewards that train are those of the folder.
    rows = prepared(run)[0]
    given = load_reward_model(learned, device="cpu")
    expected = token_values(given, [replace(row, scores=None, reference_logp=None) for row in rows], **RULES)
    assert all(all(map(np.array_equal, row.scores, one)) for row, one in zip(rows, expected, strict=True))
    # Another reward makes the stage again.
    other = Path("other") / "model"
    shutil.copytree(learned, other)
    head = load_file(other / HEAD_FILE)
    save_file({name: value + 1 for name, value in head.items()}, other / HEAD_FILE)
    identity = run.done("online").identity
    assert run_online(recipe, "online.reward=other", *changes[1:]).done("online").identity != identity


def test_oracle_is_a_reward_by_its_log_ratio(recipe, tiny_folder, tmp_path):
    """RTO: no source, and the oracle's folder names its reference."""
    oracle, reference = (load_model(str(tiny_folder), device="cpu") for _ in range(2))
    with torch.no_grad():
        for weight in oracle.model.parameters():
            weight.mul_(1.1)
    oracle.model.save_pretrained(tmp_path / "judge")
    oracle.tokenizer.save_pretrained(tmp_path / "judge")
    scorer = TokenScorer({"oracle_logp": oracle, "reference_logp": reference}, LogRatio())
    scorer.save_settings(tmp_path / "judge")
    recipe.write_text(without_learning(recipe))
    rows = prepared(
        tokenward.open_run(recipe, [f"online.reward={tmp_path / 'judge'}", REINFORCE], quiet=True)
    )[0]
    plain = [replace(row, scores=None, reference_logp=None) for row in rows]
    high, low = (token_values(model, plain, **RULES) for model in (oracle, reference))
    for row, first, second in zip(rows, high, low, strict=True):
        for scores, one, other in zip(row.scores, first, second, strict=True):
            torch.testing.assert_close(scores.float(), one - other, rtol=0, atol=1e-6)
            assert scores.abs().max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        # The control without token-level credit.
        ["online.selection={name: soft, spread: sequence}",
         "online.objective={name: weighted_likelihood, normaliser: length}", "online.source={name: rouge}"],
        ["online.selection={name: top_fraction, chosen: {fraction: 0.5}}", "reward.head.freeze=true"],
        ["online.selection={name: soft, transform: exp, uniform: 0.5}", "reward.head={hidden: null, bound: none}"],
        ["reward.head={hidden: 8, unit: sentence}", "reward.objective={name: plackett_luce, aggregate: softmin}",
         "model.adapter={r: 2, target_modules: [q_proj]}"],
        [REINFORCE, "model.head_mlp={hidden: 8, gain: 0.5, residual: true}",
         "online.sampling={max_new_tokens: 5, top_k: 0, stop: ['t'], temperature: 0.8}"],
        ["online.objective={name: reinforce, return_to_go: true, baseline: leave_one_out, entropy: 0.0}",
         "online.reward_evals=0", "online.every=null", "online.reward_groups=5",
         "examples.limit=3", "examples.development=examples.jsonl", "examples.test=examples.jsonl"],
    ],
    ids=lambda change: change[0].replace("online.", "")[:40],
)  # fmt: skip
def test_each_choice_trains_to_finite_weights(recipe, tiny_folder, change):
    run = run_online(recipe, "online.every=1", *change, "online.training.max_steps=2")
    files = [*run.path("online").rglob("*.safetensors")]
    assert len(files) >= 2
    assert all(bool(value.isfinite().all()) for file in files for value in load_file(file).values())
    whole = run.path("online") / "model" / "model.safetensors"
    assert not whole.exists() or moved(run, tiny_folder) > 1e-5
    assert run.load(str(run.path("online") / "model")).fingerprint
    if "online.reward_groups=5" in change:  # gone over more than once
        (event,) = events(run)
        assert event["groups"] + event.get("dropped", {}).get("dropped: all responses tied", 0) == 5
        assert event["steps"] == REWARD_STEPS


def test_discrete_prompt_is_learned_for_a_frozen_classifier(prompts, tiny_folder, monkeypatch, capsys):
    plain, parts = ClassificationGap.__call__, []

    def call(self, *args, **kwargs):
        parts.append((self.share, tuple(text.text for text in self.drawn())))
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationGap, "__call__", call)
        run = run_online(prompts, last="evaluation")
    assert [(e["event"], e["step"]) for e in events(run)] == [
        ("policy", 0), ("reward", 0), ("policy", 3), ("reward", 3), ("policy", 6),
    ]  # fmt: skip
    record = json.loads((run.path("evaluation") / "prompts.json").read_text())
    assert set(record) == {"learned", "untrained", "no_prompt", "random", "manual"}
    learned = record["learned"]["candidates"]
    assert 1 <= len(learned) <= 4 + 1, "four that are drawn and the likeliest one"
    assert all(len(candidate["ids"]) == 3 for candidate in learned)
    assert len(record["learned"]["test_accuracy"]) == 2
    assert len(record["random"]["candidates"]) == 3
    assert [candidate["text"] for candidate in record["manual"]["candidates"]] == ["good tea"]
    assert [candidate["ids"] for candidate in record["no_prompt"]["candidates"]] == [[]]
    capsys.readouterr()
    tokenward.run(prompts, ["run=runs/online"])
    shown = capsys.readouterr().out
    assert json.dumps(learned[0]["text"], ensure_ascii=False)[:4] in shown
    assert f"prompts: {run.path('evaluation') / 'prompts.json'}" in shown
    figures = tokenward.read_figures(run)
    assert figures["accuracy/learned"].n == 8
    assert figures["accuracy/learned"].value == pytest.approx(sum(record["learned"]["test_accuracy"]) / 2)
    difference = figures["accuracy/learned"].value - figures["accuracy/manual"].value
    assert figures["accuracy/learned_minus_manual"].value == pytest.approx(difference)
    # The policy is the network alone, on the very model that it was given.
    saved = json.loads((run.path("online") / "model" / "head_mlp.json").read_text())
    assert Path(saved["base"]) == tiny_folder.resolve()
    assert not (run.path("online") / "model" / "model.safetensors").exists()
    # Each draw ranks prompts on another part of the training texts, and on all development texts.
    train = [texts for share, texts in parts if share == 0.8]
    of_part = [{f"{'good' if i % 2 else 'bad'} tea {part} {i}" for i in range(8)} for part in (0, 1)]
    assert {len(texts) for texts in train} == {6}, "80 % of 8, rounded"
    assert len(set(train)) > 5
    assert {text for texts in train for text in texts} == of_part[0]
    assert [set(texts) for texts in {texts for share, texts in parts if share == 1.0}] == [of_part[1]]
    same(stopped(monkeypatch, prompts, [(1, TOTAL), (3, TOTAL)]), run)


def test_encoder_decoder_goes_through_the_whole_run(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "t5", tiny_t5())
    recipe = online_recipe(tmp_path / "work", folder)
    monkeypatch.chdir(recipe.parent)
    changes = ["online.objective={name: reinforce, kl: 0.1}", "tokens.template=plain"]
    run = run_online(recipe, *changes, last="evaluation")
    assert [(e["event"], e["step"]) for e in events(run)] == [("reward", 0), ("reward", 3)]
    assert moved(run, folder) > 1e-4
    reward = load_reward_model(run.path("online") / "reward", device="cpu")
    assert (reward.layout, reward.start_id) == ("encoder_decoder", reward.tokenizer.pad_token_id)
    figures = tokenward.read_figures(run)
    assert figures["references/logp_per_token/before"].value < 0
    assert figures["length/after"].value > 0
    same(stopped(monkeypatch, recipe, [(1, TOTAL)], *changes), run)  # its tied weights are whole again


def test_truncated_texts_are_counted(prompts, capsys):
    from tokenward.stages.tasks import prompt_task

    run = tokenward.open_run(prompts, ["prompt_task.max_sentence_tokens=2"])
    prompt_task(run, run.load(run.start_model))
    assert "24 of 24 texts are longer than 2 tokens" in " ".join(capsys.readouterr().out.split())


def test_reward_of_the_best_evaluation_is_kept(recipe, monkeypatch):
    """Each look is made to seem worse than the one before, so the first one is the best."""
    plain, seen = EarlyStop.on_evaluate, []

    def worse(self, args, state, control, metrics=None, **kwargs) -> None:
        seen.append({name: weight.detach().clone() for name, weight in trained_weights(kwargs["model"])})
        plain(self, args, state, control, {**metrics, "eval_loss": float(state.global_step)}, **kwargs)

    monkeypatch.setattr(EarlyStop, "on_evaluate", worse)
    run = run_online(recipe, *ONCE, "online.reward_evals=3")
    (event,) = events(run)
    assert (event["steps"], event["best_step"], len(seen)) == (3, 1, 3)
    kept = dict(load_reward_model(run.path("online") / "reward", device="cpu").model.named_parameters())
    assert all(torch.equal(kept[name], weight) for name, weight in seen[0].items())
    assert any(not torch.equal(kept[name], weight) for name, weight in seen[-1].items())


def test_reward_is_learned_per_unit(recipe, monkeypatch):
    """All tokens of a word share one reward where it is learned, as where it is used."""
    plain, learned = RewardLearner._fit, []

    def watched(self, arguments, rows, eval_rows):
        learned.append([*rows, *eval_rows])
        return plain(self, arguments, rows, eval_rows)

    monkeypatch.setattr(RewardLearner, "_fit", watched)
    token = run_online(recipe, *ONCE, run="token")
    word = run_online(recipe, *ONCE, "reward.head.unit=word", run="word")
    tokens, words = learned
    assert list(tokens) == [replace(row, segments=None) for row in words], "the same samples"
    tokenizer = word.tokenizer_template(word.start_model).tokenizer
    for plain_row, row in zip(tokens, words, strict=True):
        assert plain_row.segments is None
        expected = with_segments("word", tokenizer, replace(row, segments=None)).segments
        assert all(torch.equal(a, b) for a, b in zip(row.segments, expected, strict=True))
    losses = [events(run)[0]["loss"] for run in (token, word)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_reward_and_policy_train_with_the_published_settings(recipe, monkeypatch):
    """Of the code of TLM (arXiv 2306.00398): Adam at 5e-5, constant from the first update, gradients clipped at 5."""
    plain, used = TokenTrainer.__init__, []

    def watched(self, model, objective, arguments, rows, **kwargs):
        used.append(arguments)
        plain(self, model, objective, arguments, rows, **kwargs)

    monkeypatch.setattr(TokenTrainer, "__init__", watched)
    tables = ["reward.training={per_device_train_batch_size: 4}", "online.training={max_steps: 1}"]
    run_online(recipe, *tables, "online.every=null", run="as_published")
    assert len(used) == 2
    for arguments in used:
        assert arguments.learning_rate == 5e-5
        assert arguments.lr_scheduler_type == SchedulerType.CONSTANT
        assert arguments.warmup_steps == 0
        assert arguments.max_grad_norm == 5.0
