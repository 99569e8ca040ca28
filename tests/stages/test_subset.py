"""Subsets that a scorer selects for an auxiliary model: which rows, in what order, trained how."""

import json
from pathlib import Path

import pytest

import tokenward
from tests.stages.runs import lines, refusal, tables_of, write_lines
from tokenward.config import parse_recipe
from tokenward.scoring.store import TokenStore
from tokenward.stages import lists as stages
from tokenward.stages import oracle as oracle_stage
from tokenward.stages import subset
from tokenward.stages.auxiliary import is_needed, models_read, trained_auxiliary
from tokenward.stages.run import Run
from tokenward.tokens.rows import keys_of
from tokenward.tools.plan import plan_recipe

RUN = Path("runs/quickstart")
TRAINING = "training: {max_steps: 1, per_device_train_batch_size: 4, learning_rate: 1.0e-2}"
READS_X = "scores.scorer={name: log_probability, of: x}"


class Stopped(Exception):
    """Raised instead of training."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """What each auxiliary model would train on, by its stage; nothing is trained."""
    found: dict[str, list] = {}

    def stops(run, stage, model, objective, rows, *rest, **further):
        found[stage.path.name] = [row.comparison for row in rows]
        raise Stopped

    monkeypatch.setattr(oracle_stage, "fit_stage", stops)
    return found


def subset_lines(name: str = "x") -> list[dict]:
    return lines(RUN / f"auxiliary-{name}" / "subset.jsonl")


def stopped(recipe: Path, *changes: str) -> None:
    """A run until its auxiliary model would be trained."""
    with pytest.raises(Stopped):
        tokenward.run(recipe, [READS_X, *changes], quiet=True)


def comparisons(run: Run) -> list:
    """The training pairs."""
    rows = list(tables_of(run).train)
    return [row.comparison for row in rows]


def planted(rows: list, values: list[tuple[list[float], list[float]]]) -> str:
    """A file in which the words of replies have known scores; rows beyond the values have none."""
    found = []
    for row, sides in zip(rows, values, strict=False):
        for text, numbers in zip(row.responses, sides, strict=True):
            ends = [at for at, sign in enumerate(f"{text} ") if sign == " "]
            starts = [0, *(end + 1 for end in ends)]
            spans = [[start, end, number] for start, end, number in zip(starts, ends, numbers, strict=False)]
            content = row.prompt[-1]["content"]
            found.append({"prompt": content, "response": text, "spans": spans})
    write_lines("mine.jsonl", found)
    return "{name: external, file: mine.jsonl}"


def prepared(recipe: Path) -> list:
    return comparisons(tokenward.run(recipe, ["scores.scorer={name: random}"], last="reference", quiet=True))


VALUES = [([1.0], [9.0]), ([5.0], [0.0]), ([3.0, 1.0], [0.0]), ([5.0], [7.0]), ([0.5], [2.0])]


def auxiliary(*keys: str) -> str:
    return f"auxiliary_models={{x: {{{', '.join([TRAINING, *keys])}}}}}"


PICKED = [
    ("side: chosen, count: 3", [1, 3, 2], False),  # 5, 5 and 3: the earlier one of two equals comes first
    ("side: rejected, count: 2", [0, 3], True),
    ("side: both, count: 2", [0, 3], False),
    ("side: chosen, fraction: 0.5", [1, 3], False),  # two and a half of the five that have a score
    ("side: chosen, count: 999", [1, 3, 2, 0, 4], False),
]


def test_comparisons_with_the_highest_scores_are_selected_and_their_side_is_trained(
    tiny_workplace: Path, seen: dict
) -> None:
    rows = prepared(tiny_workplace)
    scorer = planted(rows, VALUES)
    source = (RUN / "data" / "train.jsonl").read_text().splitlines()
    for keys, picked, swap_labels in PICKED:
        table = f"subset: {{scorer: {scorer}, alone: true, {keys}}}"
        stopped(tiny_workplace, auxiliary("objective: {name: sft}", table))
        found = subset_lines()
        assert [line["source"] for line in found] == [rows[number].source for number in picked]
        assert [line["rank"] for line in found] == list(range(1, len(picked) + 1))
        sides = {"chosen": [0], "rejected": [1], "both": [0, 1]}[keys.split()[1].strip(",")]
        largest = [max(max(VALUES[number][side]) for side in sides) for number in picked]
        assert [line["score"] for line in found] == largest
        first = [comparison.responses[0] for comparison in seen["auxiliary-x"]]
        assert sorted(first) == sorted(rows[number].responses[int(swap_labels)] for number in picked)
        for line, number in zip(found, picked, strict=True):
            replies = json.loads(source[line["row"]])["responses"]
            assert tuple(replies[place] for place in line["responses"]) == rows[number].responses
    # A reply whose first word has 5 and all others -5, beside one that has 1 throughout.
    scorer = planted(rows, [([5.0] + [-5.0] * 9, [0.0]), ([1.0] * 10, [0.0])])
    for how, best in (("largest", 0), ("mean", 1), ("sum", 1)):
        stopped(
            tiny_workplace,
            auxiliary(f"subset: {{scorer: {scorer}, alone: true, count: 1, pair_score: {how}}}"),
        )
        assert [line["source"] for line in subset_lines()] == [rows[best].source]


def test_subset_of_chosen_replies_is_added_to_rejected_ones(tiny_workplace: Path, seen: dict) -> None:
    """TOSS-Pro: the degraded model learns the rejected replies, and the chosen ones whose tokens look harmful."""
    rows = prepared(tiny_workplace)
    table = f"subset: {{scorer: {planted(rows, VALUES)}, count: 2}}"
    stopped(tiny_workplace, auxiliary("objective: {name: sft}", "swap_labels: true", table))
    first = [comparison.responses[0] for comparison in seen["auxiliary-x"]]
    assert first[: len(rows)] == [row.responses[1] for row in rows]
    assert sorted(first[len(rows) :]) == sorted(rows[number].responses[0] for number in (1, 3))


def test_pair_in_both_parts_trains_once(tiny_workplace: Path, seen: dict) -> None:
    rows = prepared(tiny_workplace)
    scorer = planted(rows, [([float(number)], [0.0]) for number in range(len(rows))])
    half = "fraction: 0.5"
    stopped(tiny_workplace, auxiliary(half))
    own = {row.responses for row in seen["auxiliary-x"]}
    table = f"subset: {{scorer: {scorer}, count: {len(rows) - 2}}}"
    stopped(tiny_workplace, auxiliary(half, table))
    found = [row.responses for row in seen["auxiliary-x"]]
    picked = {row.responses for row in rows[2:]}
    assert own & picked, "some are in both"
    assert picked - own, "and some are new"
    assert len(found) == len(own | picked)
    assert set(found) == own | picked


def test_interrupted_auxiliary_model_keeps_its_subset(
    tiny_workplace: Path, seen: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prepared(tiny_workplace)
    scorer = planted(rows, VALUES)

    def changes(count: int) -> list[str]:
        table = f"subset: {{scorer: {scorer}, alone: true, count: {count}}}"
        return [READS_X, auxiliary("objective: {name: sft}", table)]

    with pytest.raises(Stopped):
        tokenward.run(tiny_workplace, changes(3), quiet=True)
    assert (RUN / "auxiliary-x" / "subset").is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(tiny_workplace.parent.parent)
    with monkeypatch.context() as patch:
        patch.setattr(subset, "_selected", lambda *_: pytest.fail("selected again"))
        run = tokenward.run(tiny_workplace, changes(3), last="auxiliary-x", quiet=True)
    done = run.done("auxiliary-x")
    assert done.facts["picked"] == done.facts["rows"] == 3
    assert "file mine.jsonl" in done.inputs
    assert not (RUN / "auxiliary-x" / "subset").exists()
    assert (
        tokenward.run(tiny_workplace, changes(3), last="auxiliary-x", quiet=True).done("auxiliary-x") == done
    )
    again = tokenward.run(tiny_workplace, changes(2), last="auxiliary-x", quiet=True).done("auxiliary-x")
    assert done.changes_to(again) == ["auxiliary-x.subset.count: 3 -> 2"]
    assert again.facts["rows"] == len(subset_lines()) == 2


ROUNDS = (
    f"auxiliary_models={{twice: {{objective: {{name: sft}}, swap_labels: true, {TRAINING}, subset: {{count: 4, "
    "scorer: {name: log_ratio, numerator: bad, denominator: good}}}, "
    f"bad: {{objective: {{name: sft}}, swap_labels: true, {TRAINING}}}, good: {{objective: {{name: sft}}, {TRAINING}}}, "
    f"unread: {{{TRAINING}, subset: {{count: 1, alone: true, scorer: {{name: log_ratio, numerator: idle}}}}}}, idle: {{{TRAINING}}}}}"
)


BOTH = (
    "scores.scorer={name: combine, parts: [{scorer: {name: log_ratio, numerator: twice, denominator: good}}, "
    "{scorer: {name: log_ratio, numerator: bad, denominator: good}}]}"
)


def test_second_round_reads_the_first_and_is_trained_after_it(
    tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, plain = [], oracle_stage.fit_stage

    def records(run, stage, *rest, **further):
        trained.append(stage.path.name)
        return plain(run, stage, *rest, **further)

    monkeypatch.setattr(oracle_stage, "fit_stage", records)
    run = tokenward.run(tiny_workplace, [ROUNDS, BOTH], last="scores", quiet=True)
    assert trained == ["auxiliary-bad", "auxiliary-good", "auxiliary-twice"]
    store, rows = TokenStore(RUN / "scores"), tables_of(run).train
    encoded = rows
    chosen = [store[keys_of(row.comparison)[0]] for row in encoded]
    largest = [float((item.value("bad_logp") - item.value("good_logp")).max()) for item in chosen]
    best = sorted(range(len(largest)), key=lambda number: -largest[number])[:4]
    assert [line["source"] for line in subset_lines("twice")] == [
        encoded[number].comparison.source for number in best
    ]
    assert [line["score"] for line in subset_lines("twice")] == pytest.approx(
        [largest[number] for number in best]
    )
    done = run.done("auxiliary-twice")
    assert done.facts["rows"] == len(encoded) + 4
    trained.clear()
    upstream = [ROUNDS, BOTH, "auxiliary_models.good.training.learning_rate=2.0e-2"]
    again = tokenward.run(tiny_workplace, upstream, last="auxiliary-twice", quiet=True)
    assert trained == ["auxiliary-good", "auxiliary-twice"]
    assert done.changes_to(again.done("auxiliary-twice")) == ["input auxiliary-good: changed"]


def run_of(*changes: str) -> Run:
    return Run(recipe=parse_recipe("seed: 0", "x.yaml", changes).recipe)


def test_models_that_a_subset_reads_are_trained_if_the_auxiliary_model_is_read() -> None:
    run = run_of(ROUNDS, BOTH)
    assert trained_auxiliary(run) == ["bad", "good", "twice"]
    assert not is_needed(run, "oracle")
    chained = run_of(ROUNDS, "scores.scorer={name: log_probability, of: unread}")
    assert trained_auxiliary(chained) == ["idle", "unread"]
    of_reward = run_of(
        auxiliary("subset: {scorer: {name: reward}, count: 1, alone: true}"),
        "scores.scorer={name: rank, of: x}",
    )
    assert models_read(of_reward) == ["reward", "x"]
    assert is_needed(of_reward, "reward")
    assert not is_needed(of_reward, "oracle")
    by_default = run_of(auxiliary("subset: {count: 1, alone: true}"), "scores.scorer={name: rank, of: x}")
    assert is_needed(by_default, "oracle")


def test_stages_are_ordered_by_what_they_read() -> None:
    auxiliary = (
        f"auxiliary_models={{b: {{{TRAINING}, subset: {{scorer: {{name: rank, of: a}}, count: 1, alone: true}}}}, "
        f"a: {{{TRAINING}, subset: {{scorer: {{name: reward}}, count: 1, alone: true}}}}}}"
    )
    run = run_of(auxiliary, "scores.scorer={name: rank, of: b}")
    assert [stage.name for stage in stages.wanted_stages(run, "scores")] == [
        "data",
        "sft",
        "reference",
        "reward",
        "auxiliary-a",
        "auxiliary-b",
        "scores",
    ]


def test_subset_without_scores_is_refused(tiny_workplace: Path, seen: dict) -> None:
    rows = prepared(tiny_workplace)
    scorer = planted(rows[:1], [([1.0], [1.0])]).replace("mine", "other")
    Path("other.jsonl").write_text(Path("mine.jsonl").read_text().replace("Say", "Tell"))
    table = f"subset: {{scorer: {scorer}, alone: true, count: 1}}"
    assert refusal(tiny_workplace, [READS_X, auxiliary(table)], last="scores").code == "no-scores"


def test_plan_counts_the_subset(tiny_workplace: Path) -> None:
    plan = plan_recipe(tiny_workplace, [ROUNDS, BOTH], measure=False, quiet=True)
    found = {stage.stage: stage for stage in plan.stages}
    auxiliary = ["auxiliary-bad", "auxiliary-good", "auxiliary-twice, subset", "auxiliary-twice"]
    assert list(found) == ["data", "reference", *auxiliary, "scores", "policy", "evaluation"]
    run = Run(recipe=parse_recipe(tiny_workplace.read_text(), "quickstart.yaml").recipe)
    prompts = len({row.prompt[-1]["content"] for row in comparisons(run)})
    assert found["auxiliary-twice, subset"].work == f"{prompts} prompts, 2 models"
    assert found["auxiliary-twice, subset"].seconds > 0
    epoch = [ROUNDS.replace("max_steps: 1", "num_train_epochs: 1"), BOTH]
    steps = {s.stage: s.work for s in plan_recipe(tiny_workplace, epoch, measure=False, quiet=True).stages}
    assert steps["auxiliary-bad"] == f"{-(-prompts // 4)} steps of 4"
    assert steps["auxiliary-twice"] == f"{-(-(prompts + 4) // 4)} steps of 4"
