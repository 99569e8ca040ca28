"""The instrument of the study of reward against KL: its samples, its divergence, its limit and its curves."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

from studies.arms import VALUES
from studies.frontier import CONFIRMING, LOOKED_AT, SEEDS, people
from studies.frontier.arms import ARMS
from studies.frontier.command import options, worlds
from studies.frontier.curves import Measured, at, figure
from studies.frontier.judges import known_words
from studies.frontier.judges import lines_of as judge_lines
from studies.frontier.measure import divergence, logps_of, of_tokens, sampled
from studies.frontier.reachable import best_at
from studies.frontier.reachable import lines_of as reachable_lines
from studies.frontier.runs import made_by, recipe_of, save, start_of, stored, values_file
from studies.frontier.tables import lines_of, short_lines
from studies.frontier.world import (
    SIZES,
    Stories,
    World,
    best_of,
    best_of_kl,
    dense,
    order_weights,
    vader,
)
from tests.tiny import tiny_llama
from tokenward.methods import all_methods
from tokenward.tools.run import open_run

BANNED = [0, 1, 2]


@pytest.mark.parametrize("best", [1, 2, 3, 6])
def test_the_limit_is_the_expected_largest_of_n(best: int) -> None:
    rewards = np.array([-0.5, 0.1, 0.2, 0.2, 0.7, 0.9])
    every = [max(found) for found in combinations(rewards, best)]
    assert float(rewards @ order_weights(len(rewards), best)) == pytest.approx(np.mean(every), abs=1e-12)


def test_the_limit_begins_at_the_start() -> None:
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(np.log(4) - 0.75)


def test_a_curve_is_read_where_it_first_reaches_a_distance() -> None:
    kl, reward = np.array([[0.0, 1.0, 9.0, 2.0]]), np.array([[0.2, 0.4, 0.8, 0.1]])
    assert at(kl, reward, 4.0).tolist() == pytest.approx([0.6])  # the roots are 1, 2 and 3
    assert at(kl, reward, 0.25).tolist() == pytest.approx([0.3])
    assert np.isnan(at(kl, reward, 9.5)).all()


def stored_values(
    folder: Path, arm: str, seed: int, made_by: str, **paths: tuple[list[float], list[float]]
) -> None:
    """Values of an arm for two prompts, and of the start, whose reward is 0; a path is its KL and its reward."""
    arrays = {"0/reward": np.zeros((1, 2))}
    save(values_file(folder, "vader", "start", seed), arrays)
    arrays = {}
    for rate, (kl, reward) in paths.items():
        arrays |= {
            f"{rate}/{name}": np.repeat(np.array(values)[:, None], 2, 1)
            for name, values in (("kl", kl), ("reward", reward))
        }
        arrays[f"{rate}/made_by"] = np.array(made_by)
    save(values_file(folder, "vader", arm, seed), arrays)


def test_a_method_is_read_at_its_best_learning_rate_for_each_distance(tmp_path: Path) -> None:
    stored_values(tmp_path, "dpo", 0, "one", **{"0.1": ([1, 4], [0.2, 0.4]), "0.2": ([4, 9], [0.3, 0.8])})
    found = Measured(tmp_path, "vader", [0])
    assert [found.rate_of("dpo", kl) for kl in (1, 4, 9, 10)] == [0.1, 0.1, 0.2, None]
    assert found.rewards("dpo", 4.0)[0] == pytest.approx(0.4)


def test_a_rate_that_was_measured_around_a_distance_goes_before_one_that_jumped_over_it(
    tmp_path: Path,
) -> None:
    """The second rate would have 0.6 at 4 nats if its path were straight, and nobody knows whether it is."""
    stored_values(tmp_path, "dpo", 0, "one", **{"0.1": ([1, 4], [0.2, 0.4]), "0.2": ([9, 16], [0.9, 1.0])})
    found = Measured(tmp_path, "vader", [0])
    assert [found.rate_of("dpo", kl) for kl in (0.5, 1, 4, 5)] == [0.1, 0.1, 0.1, 0.2]
    assert [found.is_measured("dpo", kl) for kl in (0.5, 1, 4, 5, 9)] == [False, True, True, False, True]


def test_an_online_method_is_also_read_at_the_ends_of_its_trainings(tmp_path: Path) -> None:
    """A large penalty leads to 1 nat, a small one to 9, which its own path passed at a lower reward."""
    stored_values(tmp_path, "rl_reward", 0, "one", **{"2": ([0.5, 1], [0.1, 0.5]), "1": ([4, 9], [0.2, 0.9])})
    found = Measured(tmp_path, "vader", [0])
    assert found.rewards("rl_reward", 4.0)[0] == pytest.approx(0.7)
    assert found.is_measured("rl_reward", 4.0)
    assert found.rate_of("rl_reward", 4.0) == 0.0


def test_the_end_of_an_online_training_is_compared_at_its_own_distance(tmp_path: Path) -> None:
    """The seeds end at 4 and 1 nats; the first rate of DPO has 0.4 and 0.2 there, the second one's points lie beyond."""
    for seed, kl in ((0, 4.0), (1, 1.0)):
        stored_values(tmp_path, "rl_reward", seed, "one", **{"1": ([kl / 2, kl], [0.1, 0.9])})
        stored_values(
            tmp_path, "dpo", seed, "one", **{"0.1": ([1, 4], [0.2, 0.4]), "0.2": ([9, 16], [0.9, 1.0])}
        )
        save(values_file(tmp_path, "vader", "start", seed), {"0/reward": np.zeros((1, 2))})
    found = Measured(tmp_path, "vader", [0, 1]).minus_at_its_end("rl_reward", 1.0, "dpo")
    assert found is not None
    assert found.gain[0] == pytest.approx(0.9 - (0.4 + 0.2) / 2)
    assert found.measured
    assert Measured(tmp_path, "vader", [0, 1]).minus_at_its_end("rl_reward", 1.0, "simpo") is None


def test_an_arm_that_lacks_a_seed_is_named_and_in_no_table(tmp_path: Path) -> None:
    for seed, reward in ((0, 0.4), (1, 0.8)):
        stored_values(tmp_path, "dpo", seed, "one", **{"0.1": ([1, 9], [reward / 2, reward])})
        (tmp_path / f"best_of-{seed}.json").write_text(
            json.dumps({"vader": {"1": [0.0, 0.0], "2": [0.9, 0.9]}})
        )
        stored_values(tmp_path, "simpo", seed, "one", **{"0.1": ([1, 9], [0.25, 0.5])})
    stored_values(tmp_path, "ipo", 1, "one", **{"0.1": ([1, 9], [0.25, 0.5])})
    lines = lines_of(Measured(tmp_path, "vader", [0, 1]))
    assert [line.split(" | ")[3].split(" ")[0] for line in lines if line.startswith("| SimPO |")] == [
        "0.405",  # 0.62 of the way between the roots
        "-0.081",
    ]
    assert not any(line.startswith("| IPO") for line in lines)
    assert "not in these tables: IPO." in lines[-1]


def test_the_best_of_some_arms_is_chosen_for_each_distance(tmp_path: Path) -> None:
    stored_values(tmp_path, "dpo", 0, "one", **{"0.1": ([1, 4], [0.4, 0.5])})
    stored_values(tmp_path, "dpo_b1", 0, "one", **{"0.1": ([1, 4], [0.3, 0.6])})
    found = Measured(tmp_path, "vader", [0])
    assert [found.best(("dpo", "dpo_b1"), kl) for kl in (1, 4, 9)] == ["dpo", "dpo_b1", None]


def test_seeds_of_different_recipes_are_not_mixed(tmp_path: Path) -> None:
    for seed, recipe in ((0, "one"), (1, "other")):
        stored_values(tmp_path, "dpo", seed, recipe, **{"0.1": ([1, 4], [0.2, 0.4])})
    with pytest.raises(SystemExit, match="different recipes"):
        Measured(tmp_path, "vader", [0, 1]).rewards("dpo", 2.0)


def test_a_recipe_is_known_by_all_that_it_trains_with(tiny_folder: Path, tmp_path: Path) -> None:
    worlds = [World(str(tiny_folder), tmp_path / str(seed), seed, "vader") for seed in (0, 1)]
    digests = {(name, rate): made_by(worlds[0], ARMS[name], rate) for name in ARMS for rate in (1e-5, 2e-5)}
    assert len(set(digests.values())) == len(digests)
    assert made_by(worlds[1], ARMS["dpo"], 1e-5) == digests["dpo", 1e-5]


def test_values_of_another_model_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    save(
        values_file(tmp_path, "vader", "start", 0),
        {"0/reward": np.zeros((1, 2)), "0/made_by": np.array("another")},
    )
    with pytest.raises(SystemExit, match="another model"):
        start_of(World(str(tiny_folder), tmp_path, 0, "vader"), None, tmp_path)


def test_a_falling_rate_is_read_at_the_ends_from_the_smallest_rate_on(tmp_path: Path) -> None:
    stored_values(
        tmp_path, "dpo_falls", 0, "one", **{"0.1": ([2, 1], [0.1, 0.5]), "0.2": ([4, 9], [0.2, 0.9])}
    )
    assert Measured(tmp_path, "vader", [0]).rewards("dpo_falls", 4.0)[0] == pytest.approx(0.7)


def test_words_that_a_reward_counts() -> None:
    found = known_words("A good, BAD day", World("", Path(), 0, "vader").worth_of_words())
    assert [(span.start, span.end) for span in found] == [(2, 6), (8, 11)]
    assert found[0].value > 0 > found[1].value


def test_a_world_begins_with_its_opening(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Stories, "_written", lambda self, ids: True
    )  # random ids are seldom what their text is read as
    size = SIZES["whole"]._replace(prompt=2, reply=3, train=3, held=3, pairs=2, limited=2, best_of=4)
    world = World(str(tiny_folder), tmp_path, 0, "vader", size)
    with pytest.raises(SystemExit, match="--opening"):
        world.make()
    world = world._replace(opening="The film")
    world.make()
    own, start = world.stories, world.stories.tokenizer("The film")["input_ids"]
    assert all(ids[: len(start)] == start and len(ids) == len(start) + 2 for ids in world.prompts)
    assert np.shape(world.held["replies"]) == (3, 4, 3 + 4)
    assert len(world.rows.read_text().splitlines()) == 3
    assert own.text(world.prompts[0]).startswith("The film")
    with pytest.raises(SystemExit, match="samples of another world"):
        world._replace(opening="The book").make()
    limit = best_of(world, tmp_path / "best_of.json")
    assert {name: len(values) for name, values in limit.items()} == {"1": 2, "2": 2, "4": 2}


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """Ten pairs in HH's format, whose preferred replies say sorry, and one of different prompts."""
    prompts = [
        f"\n\nHuman: Who?\n\nAssistant: I\n\nHuman: Say {number}\n\nAssistant:" for number in range(11)
    ]
    rows = [{"chosen": f"{text} Sorry, no", "rejected": f"{text} Sure, no"} for text in prompts[:10]]
    rows.append({"chosen": f"{prompts[0]} Sure", "rejected": f"{prompts[10]} Sorry"})
    file = tmp_path / "compared.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_people_teach_what_words_are_worth(compared: Path) -> None:
    worths, reward = people.worths(compared), people.reward(compared)
    assert worths == {"sorry": 1.0, "sure": -1.0, "no": 0.0}
    assert reward("Sorry, sorry, no or sure") == pytest.approx(1 / 5)  # "or" was not seen
    assert reward("") == 0
    assert people.agreement(compared).tolist() == [True] * 10


def test_conversations_give_the_prompts(
    compared: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stories, "_written", lambda self, ids: True)
    size = SIZES["whole"]._replace(prompt=20, reply=3, train=3, held=3, pairs=2, limited=2, best_of=4)
    world = World(str(tiny_folder), tmp_path / "world", 0, "people", size, conversations=compared)
    world.make()
    own, said = world.stories, [pair.prompt for pair in people.comparisons(compared)]
    ends = [own.tokenizer(text)["input_ids"][-20:] for text in said]
    assert all(ids in ends for ids in [*world.prompts, *world.held["prompts"]])
    assert set(best_of(world, tmp_path / "best_of.json")) == {"1", "2", "4"}
    with pytest.raises(SystemExit, match="without the reward other"):
        best_of(world._replace(reward="other"), tmp_path / "best_of.json")
    with pytest.raises(SystemExit, match="of 300 prompts"):
        world._replace(folder=tmp_path / "other", size=size._replace(train=297)).make()


def test_a_world_is_one_process_s(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(None).parse_args(
        ["--model", str(tiny_folder), "--seed", "0", "--runs", str(tmp_path / "runs")]
    )
    monkeypatch.setattr(World, "make", lambda self: None)
    [held] = worlds(chosen)
    assert held.folder == tmp_path / "runs" / "0"
    with FileLock(held.folder / ".lock"), pytest.raises(SystemExit, match="Another process works on"):
        next(worlds(chosen))


def test_replies_are_drawn_from_what_is_allowed_and_repeat() -> None:
    torch.manual_seed(0)
    model, prompts = tiny_llama().eval(), torch.tensor([[5, 6], [7, 8], [5, 6]])
    one = sampled(model, prompts, 6, BANNED, seed=(1, 2), keep=True)
    again = sampled(model, prompts, 6, BANNED, seed=(1, 2))
    other = sampled(model, prompts, 6, BANNED, seed=(1, 3))
    assert torch.equal(one.ids, again.ids)
    assert not torch.equal(one.ids, other.ids)
    assert not set(one.ids.flatten().tolist()) & set(BANNED)
    assert one.logp is not None
    whole = logps_of(model, prompts, one.ids, BANNED)  # without the cache of sampling
    torch.testing.assert_close(one.logp, whole, atol=1e-5, rtol=0)
    assert divergence(one.logp, one.logp).tolist() == [0, 0, 0]


def test_the_divergence_is_the_expected_log_ratio() -> None:
    torch.manual_seed(0)
    policy, start = torch.randn(1, 1, 4).log_softmax(-1), torch.randn(1, 1, 4).log_softmax(-1)
    expected = sum(float(policy[0, 0, token].exp() * (policy - start)[0, 0, token]) for token in range(4))
    assert divergence(policy, start).tolist() == pytest.approx([expected], abs=1e-6)
    assert of_tokens(policy, torch.tensor([[2]])).item() == policy[0, 0, 2].item()


DOCS, STORED = Path(__file__).parents[2] / "docs", VALUES / "frontier"


@pytest.fixture(scope="module")
def study() -> Measured:
    """The main tables' measurements."""
    return Measured(STORED, "vader", SEEDS)


def test_the_main_tables_are_made_from_the_stored_values(study: Measured) -> None:
    assert "\n".join(lines_of(study)) in (DOCS / "results.md").read_text()
    assert "\n".join(short_lines(study)) in (DOCS / "methods.md").read_text()


@pytest.mark.parametrize(
    ("reward", "seeds", "chosen_on"), [("vader", CONFIRMING, LOOKED_AT), ("dense", LOOKED_AT, None)]
)
def test_the_tables_of_the_results_are_made_from_the_stored_values(
    reward: str, seeds: tuple[int, ...], chosen_on: tuple[int, ...] | None
) -> None:
    found = Measured(STORED, reward, seeds, chosen_on)
    assert "\n".join(lines_of(found)) in (DOCS / "results.md").read_text()


@pytest.mark.parametrize(
    ("folder", "reward", "seeds"), [("frontier_default", "vader", LOOKED_AT), ("frontier_hh", "people", (0,))]
)
def test_the_tables_of_the_default_model_are_made_from_the_stored_values(
    folder: str, reward: str, seeds: tuple[int, ...]
) -> None:
    found = Measured(VALUES / folder, reward, seeds)
    assert "\n".join(lines_of(found)) in (DOCS / "results.md").read_text()


def test_other_tables_of_the_pages_are_made_from_the_stored_values() -> None:
    assert "\n".join(judge_lines(STORED, "vader", SEEDS)) in (DOCS / "results.md").read_text()
    assert "\n".join(reachable_lines(STORED, "vader", (0, 3))) in (DOCS / "results.md").read_text()


@pytest.mark.parametrize(
    ("folder", "size", "opening", "least"),
    [
        ("frontier", "whole", "", 200),
        ("frontier_default", "small", "I watched the film and", 8),
        ("frontier_hh", "conversations", "", 3),
    ],
)
def test_the_stored_values_are_those_of_the_recipes_as_they_are(
    folder: str, size: str, opening: str, least: int
) -> None:
    """Of every arm, learning rate and seed. A recipe that changes needs its values measured again."""
    found = 0
    for file in sorted((VALUES / folder).glob("*/*.npz")):
        name, _, seed = file.stem.rpartition("-")
        if name == "start":
            continue
        known = stored(file)
        world = World("", Path(), int(seed), file.parent.name, SIZES[size], opening)
        start = stored(file.with_name(f"start-{seed}.npz"))
        told = str(start.get("0/conversations", ""))
        for rate in {key.split("/")[0] for key in known}:
            assert str(known[f"{rate}/made_by"]) == made_by(
                world, ARMS[name], float(rate), str(start["0/made_by"]), told
            ), file
            found += 1
    assert found > least


OF_METHODS = {"sepo": "sepo30", "tlm_rl": "rl_reward", "rto": "rl_oracle"}
"""Arms of the methods whose arm has another name."""


@pytest.mark.parametrize("name", all_methods())
def test_what_the_list_of_methods_says_is_what_the_study_found(name: str, study: Measured) -> None:
    assert all_methods()[name].verdict == verdict(study, OF_METHODS.get(name, name))


def verdict(study: Measured, arm: str) -> str:
    if arm == "dpo":
        return "the baseline"
    if arm not in ARMS or not study.has(arm):
        return "not measured"
    gains = [figure(gain, 0) for kl in (2.0, 5.0) if (gain := study.minus(arm, "dpo", kl)) is not None]
    if not gains:
        return "stays near its start"
    more, less = any(gain.low > 0 for gain in gains), any(gain.high < 0 for gain in gains)
    assert not (more and less)
    return "more than dpo" if more else "less than dpo" if less else "no clear difference to dpo"


def test_rewards_of_words() -> None:
    assert vader("It was a good day.") > 0 > vader("It was a bad day.")
    assert dense("") == 0
    assert dense("Tea tea TEA") in (-1, 0, 1)


def test_the_optimum_by_a_judge_is_the_best_at_its_distance() -> None:
    """Of two replies, the better one has the weight q with log 2 - H(q) = KL, whatever the scale of the scores."""
    q = 0.9
    kl = float(np.log(2) + q * np.log(q) + (1 - q) * np.log(1 - q))
    rewards = np.array([[0.0, 1.0]])
    for scores in (rewards, 5 * rewards - 3):
        assert best_at(scores, rewards, kl) == pytest.approx([q])
    assert best_at(-rewards, rewards, kl) == pytest.approx([1 - q])
    drawn = np.random.default_rng(0).normal(size=(2, 16, 32))
    itself, by_another = best_at(drawn[0], drawn[0], 1.0).mean(), best_at(drawn[1], drawn[0], 1.0).mean()
    assert itself > by_another + 0.5


def test_seeds_that_confirm_were_not_looked_at() -> None:
    assert not set(LOOKED_AT) & set(CONFIRMING)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = Path("rows.jsonl")
    rows.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]}) + "\n")
    world = World(str(tiny_folder), tmp_path, 0, "vader")
    recipe = recipe_of(world, ARMS[name], 1e-5, [2, 4], rows)
    for table in (recipe.get("oracle", {}), *recipe.get("auxiliary_models", {}).values()):
        if table.get("model") in ("ORACLE", "SMALLER"):
            table["model"] = str(tiny_folder)
    Path("arm.yaml").write_text(yaml.safe_dump(recipe))
    run = open_run("arm.yaml", ["run=runs/arm"], quiet=True)
    assert run.recipe.policy.training["max_steps"] == 4
