"""Guided runs on tiny models: the whole loop, seeds, stops and resumes, both objectives, both tasks, a T5."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import tokenward
from tests.pipeline.tools import (
    PROMPTS,
    REINFORCE,
    digests,
    events,
    guided,
    guided_recipe,
    press_when,
)
from tests.tiny import save_tiny, tiny_t5
from tokenward.models.reward import load_reward_model
from tokenward.objectives import Reinforce, WeightedLikelihood
from tokenward.sampling import TransformersSampler
from tokenward.scoring.values import token_values
from tokenward.selection import SoftWeights
from tokenward.stages.lists import run_through
from tokenward.stages.online import _prepare, fresh_reward, online_policy, task_of
from tokenward.training.fit import Interrupted

TOTAL, REWARD_STEPS = 6, 3
RULES = {"precision": "float32", "tokens_per_batch": 8192}


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = guided_recipe(tmp_path / "work", tiny_folder)
    monkeypatch.chdir(made.parent)
    return made


@pytest.fixture
def prompts(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = guided_recipe(tmp_path / "work", tiny_folder, PROMPTS)
    monkeypatch.chdir(made.parent)
    return made


@pytest.fixture
def t5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = save_tiny(tmp_path / "t5", tiny_t5())
    made = guided_recipe(tmp_path / "work", folder)
    made.write_text(made.read_text().replace("tokens: {", "tokens: {template: plain, "))
    monkeypatch.chdir(made.parent)
    return made


def moved(run, start: Path) -> float:
    """How far the policy's weights are from where they began."""
    before, after = (
        load_file(start / "model.safetensors"),
        load_file(run.path("online") / "model" / "model.safetensors"),
    )
    return max(float((before[name] - after[name]).abs().max()) for name in before)


def test_the_whole_run_on_examples(recipe, tiny_folder):
    run = guided(recipe, "online.evaluate_every=2", last="evaluation")
    assert {path.parent.name for path in run.folder.glob("*/manifest.json")} == {
        "examples", "online", "evaluation",
    }  # fmt: skip
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
    facts = run.done("online").facts
    assert (facts["steps"], facts["rewards_learned"]) == (TOTAL, 2)
    looks = {event["step"]: event["score"] for event in found if event["event"] == "policy"}
    assert facts["best_step"] == max(looks, key=lambda step: (looks[step], -step))
    figures = tokenward.read_figures(run)
    assert {"references/logp_per_token/change", "rouge1/after", "length/before", "ended/change"} <= set(
        figures
    )
    samples = [
        json.loads(line) for line in (run.path("evaluation") / "samples.jsonl").read_text().splitlines()
    ]
    assert len(samples) == figures["rouge1/after"].n > 0
    assert set(samples[0]["values"]) == {"rouge1", "length", "ended"}
    assert samples[0]["references"] == ["the good tea on the table", "a good cup"]
    # The reward is an ordinary folder, and not the one that it began as.
    reward = load_reward_model(run.path("online") / "reward", device="cpu")
    AutoModel.from_pretrained(run.path("online") / "reward")
    start = load_file(tiny_folder / "model.safetensors")
    mine = reward.model.backbone.state_dict()
    assert not torch.equal(mine["embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert not (run.path("online") / "checkpoints").exists()


def test_what_is_done_is_not_done_again_and_a_changed_setting_is(recipe):
    def stamps(run):
        return {p.parent.name: p.read_text() for p in run.folder.glob("*/manifest.json")}

    before = stamps(guided(recipe, last="evaluation"))
    assert stamps(guided(recipe, last="evaluation")) == before
    after = stamps(guided(recipe, "online.samples=2", last="evaluation"))
    assert {name for name in before if before[name] != after[name]} == {"online", "evaluation"}
    assert stamps(guided(recipe, last="evaluation")) == before, "what was kept comes back"
    after = stamps(guided(recipe, "evaluation.prompts=1", last="evaluation"))
    assert {name for name in before if before[name] != after[name]} == {"evaluation"}


CHOICES = {
    "likelihood": [],
    "likelihood, bf16": ["online.training.bf16=true"],
    "likelihood, fresh": ["online.restart=fresh"],
    "reinforce": [REINFORCE],
    "reinforce, fresh, kl": ["online.objective={name: reinforce, kl: 0.1}", "online.restart=fresh"],
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_same_seed_gives_the_same_bits_after_any_stop_too(recipe, tiny_folder, monkeypatch, name):
    """Stopped before, in and after the step that learns the reward again, and while it is learned."""
    changes = [*CHOICES[name], "online.evaluate_every=4", "online.patience=9"]
    whole = guided(recipe, *changes, run="whole")
    files = digests(whole)
    assert set(files) == {
        "model/model.safetensors", "reward/model.safetensors", "reward/token_reward_head.safetensors", "trained.safetensors",
    }  # fmt: skip
    # The key is pressed when a step has been looked at already, so the next step is the last one.
    places = {
        "before": lambda s: (s.global_step, s.max_steps) == (1, TOTAL),
        "while learning": lambda s: (s.global_step, s.max_steps) == (2, REWARD_STEPS),
    }
    if name in ("likelihood", "reinforce"):
        places |= {
            "at": lambda s: (s.global_step, s.max_steps) == (2, TOTAL),
            "after": lambda s: (s.global_step, s.max_steps) == (3, TOTAL),
        }
    for place, due in places.items():
        with monkeypatch.context() as patch:
            press_when(patch, due)
            with pytest.raises(Interrupted, match="goes on from there"):
                guided(recipe, *changes, run=place)
        assert not Path(f"runs/{place}/online/model").exists()
        with monkeypatch.context() as patch:
            steps = press_when(patch, lambda state: False)
            again = guided(recipe, *changes, run=place)
        assert (1, TOTAL) not in steps, "it goes on; it does not begin again"
        assert digests(again) == files, place
        assert events(again) == events(whole), place


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_another_run(recipe, tiny_folder):
    one, two = (guided(recipe, run=name, last="evaluation") for name in ("one", "two"))
    assert digests(one) == digests(two)
    metrics = [(run.path("evaluation") / "metrics.json").read_bytes() for run in (one, two)]
    assert metrics[0] == metrics[1]
    assert events(one) == events(two)
    assert moved(one, tiny_folder) > 1e-4
    other = guided(recipe, "seed=1", run="other")
    assert all(digests(other)[name] != digest for name, digest in digests(one).items())


def test_a_fresh_restart_is_not_a_warm_one(recipe):
    warm, fresh = guided(recipe, run="warm"), guided(recipe, "online.restart=fresh", run="fresh")
    assert digests(warm) != digests(fresh)
    # The first time is the same; the second begins elsewhere.
    assert events(warm)[0] == events(fresh)[0]
    assert events(warm)[1] != events(fresh)[1]


def test_patience_ends_the_policy_early_and_puts_the_best_back(recipe, tiny_folder):
    """The policy does not change, so none of its looks is better than the first."""
    changes = ["online.evaluate_every=1", "online.patience=2", "online.training.learning_rate=0.0"]
    run = guided(recipe, *changes)
    assert [(e["event"], e["step"]) for e in events(run)] == [
        ("policy", 0), ("reward", 0), ("policy", 1), ("policy", 2), ("stop", 2),
    ]  # fmt: skip
    assert run.done("online").facts["steps"] == 2
    assert run.done("online").facts["best_step"] == 0
    assert moved(run, tiny_folder) == 0


def test_patience_ends_the_reward_early_and_puts_the_best_back(recipe):
    """A reward that does not change is at its best at the first look, one step in."""
    changes = ["reward.training.learning_rate=0.0", "online.reward_evals=3", "online.reward_patience=1"]
    run = guided(recipe, *changes)
    assert [(e["steps"], e["best_step"]) for e in events(run)] == [(2, 1)] * 2
    reward = load_reward_model(run.path("online") / "reward", device="cpu")
    start = fresh_reward(run).model.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in reward.model.state_dict().items())


def test_groups_that_cost_are_gone_over_more_than_once(recipe):
    run = guided(recipe, "online.reward_groups=5", "online.training.max_steps=1")
    (event,) = events(run)
    assert event["groups"] + event.get("dropped", {}).get("dropped: all responses tied", 0) == 5
    assert event["steps"] == REWARD_STEPS


def watched(monkeypatch) -> list[tuple[list[list[int]], int, int, list]]:
    """Every call of the sampler: prompts, count, seed and replies."""
    plain, calls = TransformersSampler.__call__, []

    def call(self, prompts, *, count, seed, progress=None):
        found = plain(self, prompts, count=count, seed=seed, progress=progress)
        calls.append((list(prompts), count, seed, found))
        return found

    monkeypatch.setattr(TransformersSampler, "__call__", call)
    return calls


def test_every_draw_of_a_run_is_another_one(recipe, monkeypatch):
    """Each micro-batch of each update, each time the reward is learned; only looks at the policy repeat theirs."""
    calls = watched(monkeypatch)
    changes = ["online.training.gradient_accumulation_steps=2", "online.training.max_steps=4"]
    guided(recipe, REINFORCE, *changes, "online.every=2", "online.evaluate_every=2")
    rollouts = [(prompts, seed) for prompts, count, seed, _ in calls if len(prompts) in (2, 4) and count == 3]
    learning = [seed for prompts, count, seed, _ in calls if len(prompts) == 12]
    looks = [seed for prompts, count, seed, _ in calls if count == 1]
    assert len(learning) == len(set(learning)) == 2
    assert len(looks) == 3
    assert len(set(looks)) == 1
    # 4 updates, whose 2 micro-batches draw together, and twice the two development examples for the reward.
    assert sorted(len(prompts) for prompts, _ in rollouts) == [2] * 2 + [4] * 4
    assert len({seed for _, seed in rollouts}) == 6


def test_a_look_at_the_policy_scores_fresh_replies_of_the_policy_then(recipe, monkeypatch):
    calls = watched(monkeypatch)
    run = guided(recipe, "online.evaluate_every=3", "online.evaluation_samples=2")
    looks = [replies for _, count, _, replies in calls if count == 2]
    scores = [
        sum(-abs(len(reply.text.split()) - 3) for group in groups for reply in group) / sum(map(len, groups))
        for groups in looks
    ]
    assert [e["score"] for e in events(run) if e["event"] == "policy"] == pytest.approx(scores)


def prepared(run, rows=2):
    """A few of a run's rows as they train, with what made them."""
    run_through(run, "examples")
    policy = online_policy(run)
    task, reward = task_of(run, policy), fresh_reward(run)
    online = run.recipe.online
    objective = Reinforce(kl=0.1) if online.objective.name == "reinforce" else WeightedLikelihood()
    prepare = _prepare(run, online, objective, SoftWeights(), policy, reward, task)
    given = task.rows[:rows]
    return prepare(given, 0), given, reward, policy


def test_the_likelihood_of_the_first_reference_is_weighted_by_its_rewards(recipe):
    run = tokenward.open_run(recipe, quiet=True)
    found, given, reward, policy = prepared(run)
    rewards = token_values(reward, given, **RULES)
    for row, plain, mine in zip(found, given, rewards, strict=True):
        assert row.comparison.responses == ("the good tea on the table",)
        assert row.responses[0][-1] == policy.tokenizer.eos_token_id
        assert replace(row, weights=None, scores=None) == plain
        assert torch.equal(row.scores[0], mine[0])
        # w_t = r_t / sum r, in units of 1 / T
        torch.testing.assert_close(row.weights[0], mine[0] / mine[0].mean(), rtol=1e-5, atol=0)


def test_reinforce_trains_on_samples_their_rewards_and_the_start_as_reference(recipe):
    run = tokenward.open_run(recipe, [REINFORCE], quiet=True)
    found, given, reward, policy = prepared(run)
    assert [row.responses for row in given] == [[], []], "no written response plays a part"
    plain = [replace(row, scores=None, reference_logp=None) for row in found]
    for row, mine, reference in zip(
        found, token_values(reward, plain, **RULES), token_values(policy, plain, **RULES), strict=True
    ):
        assert len(row.responses) == 3
        assert all(torch.equal(a, b) for a, b in zip(row.scores, mine, strict=True))
        # The policy has not trained yet, so it is its own reference.
        assert all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip(row.reference_logp, reference, strict=True)
        )
        assert row.weights is None


def test_reinforce_compares_with_the_start_and_not_with_the_policy_of_now(recipe):
    run = tokenward.open_run(recipe, [REINFORCE], quiet=True)
    run_through(run, "examples")
    policy = online_policy(run)
    task, reward = task_of(run, policy), fresh_reward(run)
    prepare = _prepare(run, run.recipe.online, Reinforce(kl=0.1), SoftWeights(), policy, reward, task)
    with torch.no_grad():  # as if it had trained
        for weight in policy.model.parameters():
            weight.mul_(1.2)
    found = prepare(task.rows[:2], 5)
    plain = [replace(row, scores=None, reference_logp=None) for row in found]
    start, now = (token_values(model, plain, **RULES) for model in (run.load(run.start_model), policy))
    for row, first, last in zip(found, start, now, strict=True):
        for mine, then, later in zip(row.reference_logp, first, last, strict=True):
            torch.testing.assert_close(mine, then, rtol=0, atol=1e-5)
            assert float((mine - later).abs().max()) > 1e-2


def test_a_larger_unit_gives_every_token_of_a_word_one_reward(recipe):
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


def test_plain_likelihood_learns_no_reward(recipe, tiny_folder):
    run = guided(recipe, "online.selection={name: all}", "online.evaluate_every=3", last="evaluation")
    assert {event["event"] for event in events(run)} == {"policy"}
    assert not (run.path("online") / "reward").exists()
    assert run.done("online").facts["rewards_learned"] == 0


@pytest.mark.parametrize(
    "change",
    [
        # The control without token-level credit.
        ["online.selection={name: soft, spread: sequence}",
         "online.objective={name: weighted_likelihood, normaliser: length}"],
        ["online.selection={name: top_fraction, chosen: {fraction: 0.5}}"],
        ["online.selection={name: soft, transform: exp, uniform: 0.5}", "reward.head={hidden: null, bound: none}"],
        ["reward.head={hidden: 8, unit: sentence}", "reward.objective={name: plackett_luce, aggregate: softmin}"],
        ["reward.head.freeze=true"],
        ["model.adapter={r: 2, target_modules: [q_proj]}"],
        [REINFORCE, "model.head_mlp={hidden: 8, gain: 0.5, residual: true}"],
        [REINFORCE, "online.sampling={max_new_tokens: 5, top_k: 0, stop: ['t'], temperature: 0.8}"],
        ["online.objective={name: reinforce, return_to_go: true, baseline: leave_one_out, entropy: 0.0}"],
        ["online.reward_evals=0", "online.every=null"],
        ["online.source={name: rouge}"],
        ["examples.limit=3", "examples.development=examples.jsonl", "examples.test=examples.jsonl"],
    ],
    ids=lambda change: change[0].replace("online.", "")[:40],
)  # fmt: skip
def test_each_choice_trains_to_a_finite_end(recipe, tiny_folder, change):
    run = guided(recipe, *change, "online.training.max_steps=4")
    files = [*run.path("online").rglob("*.safetensors")]
    assert len(files) >= 2
    assert all(bool(value.isfinite().all()) for file in files for value in load_file(file).values())
    whole = run.path("online") / "model" / "model.safetensors"
    assert not whole.exists() or moved(run, tiny_folder) > 1e-5
    assert run.load(str(run.path("online") / "model")).fingerprint


def test_a_checkpoint_that_was_cut_off_is_left_out(recipe, monkeypatch):
    """The reward is written after transformers' own part: without it a checkpoint is no place to go on from."""
    whole = guided(recipe, run="whole")
    with monkeypatch.context() as patch:
        press_when(patch, lambda s: (s.global_step, s.max_steps) == (4, TOTAL))
        with pytest.raises(Interrupted):
            guided(recipe, run="cut")
    (checkpoint,) = Path("runs/cut/online/checkpoints").glob("checkpoint-*")
    (checkpoint / "alternating.json").unlink()
    again = guided(recipe, run="cut")
    assert digests(again) == digests(whole)
    assert events(again) == events(whole)


def test_a_discrete_prompt_is_learned_for_a_frozen_classifier(prompts, tiny_folder, capsys):
    run = guided(prompts, last="evaluation")
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
    tokenward.run(prompts, ["run=runs/guided"])
    shown = capsys.readouterr().out
    assert "learned prompts" in shown
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


def test_a_learned_prompt_is_the_same_after_a_stop(prompts, monkeypatch):
    whole = guided(prompts, run="whole")
    for number, step in enumerate((1, 2)):
        with monkeypatch.context() as patch:
            press_when(patch, lambda s, step=step: (s.global_step, s.max_steps) == (step, TOTAL))
            with pytest.raises(Interrupted):
                guided(prompts, run=f"stop{number}")
        again = guided(prompts, run=f"stop{number}")
        assert digests(again) == digests(whole)
        assert events(again) == events(whole)


def test_prompts_are_ranked_on_another_part_of_the_texts_in_each_draw(prompts, monkeypatch):
    from tokenward.sampling.classification import ClassificationGap

    plain, parts = ClassificationGap.__call__, []

    def call(self, *args, **kwargs):
        parts.append((self.share, tuple(text.text for text in self.drawn())))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ClassificationGap, "__call__", call)
    guided(prompts)
    train = [texts for share, texts in parts if share == 0.8]
    development = {texts for share, texts in parts if share == 1.0}
    assert {len(texts) for texts in train} == {6}, "80 % of 8, rounded"
    assert len(set(train)) > 5
    assert {text for texts in train for text in texts} == {
        f"{'good' if i % 2 else 'bad'} tea 0 {i}" for i in range(8)
    }
    assert development == {tuple(f"{'good' if i % 2 else 'bad'} tea 1 {i}" for i in range(8))}


@pytest.mark.parametrize("name", ["likelihood", "reinforce, fresh, kl"])
def test_an_encoder_decoder_goes_through_the_whole_run(t5, tmp_path, name):
    run = guided(t5, *CHOICES[name], last="evaluation")
    assert [(e["event"], e["step"]) for e in events(run)] == [("reward", 0), ("reward", 3)]
    assert moved(run, tmp_path / "t5") > 1e-4
    reward = load_reward_model(run.path("online") / "reward", device="cpu")
    assert (reward.layout, reward.start_id) == ("encoder_decoder", reward.tokenizer.pad_token_id)
    figures = tokenward.read_figures(run)
    assert figures["references/logp_per_token/before"].value < 0
    assert figures["length/after"].value > 0


@pytest.mark.parametrize("name", ["likelihood", "reinforce"])
def test_an_encoder_decoder_with_tied_weights_goes_on_after_a_stop(t5, monkeypatch, name):
    whole = guided(t5, *CHOICES[name], run="whole")
    with monkeypatch.context() as patch:
        press_when(patch, lambda s: (s.global_step, s.max_steps) == (1, TOTAL))
        with pytest.raises(Interrupted):
            guided(t5, *CHOICES[name], run="stopped")
    again = guided(t5, *CHOICES[name], run="stopped")
    assert digests(again) == digests(whole)
    assert events(again) == events(whole)


def test_texts_that_are_cut_are_counted(prompts, capsys):
    from tokenward.stages.prompt_task import prompt_task

    run = tokenward.open_run(prompts, ["prompt_task.max_sentence_tokens=2"])
    prompt_task(run, run.load(run.start_model))
    assert "24 of 24 texts are longer than 2 tokens and lose their end" in " ".join(
        capsys.readouterr().out.split()
    )
