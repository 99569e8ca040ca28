"""Selections that the stored scores of one pair do not show: online, per batch, by words, of a term."""

import json
import shutil
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tokenward
from tests.report.test_report import data_of
from tokenward import cli
from tokenward.errors import UserError
from tokenward.objectives.selected import Selected
from tokenward.report.collect import RunFolder
from tokenward.report.page import make_report
from tokenward.report.selections import selections_of
from tokenward.report.show import shown_pair
from tokenward.selection import TopFraction

RUN = Path("runs/quickstart")
HALF = "{name: top_fraction, chosen: {fraction: 0.5}, rejected: {fraction: 0.5}}"
DRAWN = "{name: top_fraction, ties: random, chosen: {fraction: 0.5, direction: random}}"
SIGNED = "{name: transform, signed: true, steps: [{sigmoid: {shift: -0.5}}]}"
SUM = (
    f"policy.objective={{name: sum, terms: [{{name: dpo}}, {{name: treg, selection: {SIGNED}}}, "
    f"{{name: treg, selection: {DRAWN}}}]}}"
)
ONLINE = [
    "scores.scorer={name: probability, of: policy}",
    "policy.selection={name: transform, steps: [{threshold: {at: mean, keep: below}}]}",
    "policy.training.logging_steps=1",
]


def trained(recipe: Path, *changes: str) -> None:
    tokenward.run(recipe, list(changes), last="policy", quiet=True)


def values_of(html: str, name: str) -> dict[tuple[int, ...], list[float]]:
    """A channel's values by the ids of the response."""
    found = {}
    for pair in data_of(html)["comparisons"]:
        for response in pair["responses"]:
            ids = np.frombuffer(b64decode(response["ids"]), "<i4")
            found[tuple(ids.tolist())] = np.frombuffer(b64decode(response["values"][name]), "<f4").tolist()
    return found


def test_an_online_selection_is_described_and_nothing_is_marked(copied_run: Path) -> None:
    trained(copied_run, *ONLINE)
    html = " ".join(make_report(RUN).html.split())
    assert "no policy yet" not in html
    assert "selected online, from the log-probability of the current policy" in html
    assert "The recipe's selection is <code>transform</code>" in html
    assert "scorer probability are not stored. This page shows surprisal." in html
    assert "policy: share of selected tokens" in html
    assert "is drawn <a" in html
    data = data_of(html)
    assert data["selection"]["silent"]
    assert "weight" not in {channel["kind"] for channel in data["channels"]}
    shown = shown_pair(RUN, 1)
    assert not any(token.kept for side in shown.sides for token in side)
    assert "are not stored" in " ".join(shown.notes)
    facts = json.loads((RUN / "policy" / "manifest.json").read_text())["facts"]
    assert "kept" not in facts  # every step has its own share, in the history


def test_a_recipe_that_trains_on_every_token_marks_none(copied_run: Path, opened) -> None:
    trained(copied_run, "policy.selection={name: all}", "policy.objective={name: dpo, beta: 0.1}")
    shown = shown_pair(RUN, 1)
    assert not any(token.kept for side in shown.sides for token in side)
    assert "trains on every token" in " ".join(shown.notes)
    page = opened(make_report(RUN).save().resolve())
    assert page.locator(".sides .kept").count() == 0
    assert page.locator("#is-marked").is_hidden()
    assert "trains on every token" in page.locator("#kept").text_content()
    page.locator("#chosen-rate").fill("0.5")
    assert page.locator(".sides .kept").count() > 0


def test_a_policy_that_trains_on_its_own_replies_says_so(copied_run: Path) -> None:
    trained(
        copied_run,
        "policy.selection={name: all}",
        "policy.objective={name: reinforce, entropy: 0.0, kl: 0.1}",
        "policy.sampling={max_new_tokens: 4}",
        "policy.rollouts=2",
        "policy.training={max_steps: 1, per_device_train_batch_size: 2}",
    )
    [note] = shown_pair(RUN, 1).notes
    assert "replies of its own" in note
    html = make_report(RUN).html
    assert note in html
    assert data_of(html)["selection"]["whole"] == note


def test_a_term_s_marks_are_shown_where_the_policy_trains_on_every_token(copied_run: Path, opened) -> None:
    objective = f"{{name: sum, terms: [{{name: dpo}}, {{name: treg, selection: {SIGNED}}}]}}"
    trained(copied_run, "policy.selection={name: all}", f"policy.objective={objective}")
    page = opened(make_report(RUN).save().resolve())
    assert page.locator(".sides .kept").count() == 0
    page.locator("#weights").select_option("weight of treg")
    assert page.locator(".sides .kept").count() > 0
    assert "every token" not in page.locator("#kept").text_content()


def test_weights_that_depend_on_other_pairs_are_not_guessed(copied_run: Path) -> None:
    batch = (
        "policy.selection={name: transform, steps: [{top: {fraction: 0.6, which: largest, scope: batch}}]}"
    )
    trained(copied_run, batch)
    html = make_report(RUN).html
    assert "selected per training batch" in html
    assert data_of(html)["selection"]["silent"]
    assert "per training batch" in " ".join(shown_pair(RUN, 1).notes)
    for scope, words in (("batch", "over a batch"), ("dataset", "over a data set")):
        trained(copied_run, f"policy.selection={{name: top_fraction, scope: {scope}}}")
        html = make_report(RUN).html
        assert words in html
        assert not data_of(html)["selection"]["silent"]
        assert "weight" not in {channel["name"] for channel in data_of(html)["channels"]}
        nearest = selections_of(RunFolder.read(RUN))[0].nearest
        assert isinstance(nearest, TopFraction)
        assert nearest.scope == "response"
        shown = shown_pair(RUN, 1)
        assert "within each response" in shown.rule
        assert any(token.kept for token in shown.sides[0])
    trained(copied_run, "policy.selection={name: transform, steps: [{segment_pool: {segment: word}}, relu]}")
    assert "weights belong to words" in make_report(RUN).html
    trained(copied_run, "policy.selection={name: threshold, above: 0.1}")
    html = make_report(RUN).html
    assert "The recipe's selection is <code>threshold</code>" in html
    assert "weight" in {channel["name"] for channel in data_of(html)["channels"]}
    part = "{scorer: {name: log_ratio}, steps: [{standardise: {scope: dataset}}]}"
    trained(copied_run, f"scores.scorer={{name: combine, parts: [{part}]}}")
    assert "compared with those of all other responses" in make_report(RUN).html


Seen = dict[str, dict[tuple[int, ...], list[float]]]


@pytest.fixture(scope="module")
def sum_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A workplace with a trained sum with selections, and the weights of its training by selector and response."""
    copy = tmp_path_factory.mktemp("sum") / "copy"
    shutil.copytree(finished_run, copy)
    seen: Seen = {}
    plain = Selected._weights

    def noted(self, logp, batch):
        weights, _ = found = plain(self, logp, batch)
        sizes = batch.response.bincount(minlength=batch.responses).tolist()
        for ids, mine in zip(batch.ids.split(sizes), weights.split(sizes), strict=True):
            seen.setdefault(type(self.selector).__name__, {})[tuple(ids.tolist())] = mine.tolist()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selected, "_weights", noted)
        patch.chdir(copy)
        changes = (SUM, f"policy.selection={HALF}", "policy.training.max_steps=6")
        trained(Path("recipes/quickstart.yaml"), *changes)
    return copy, seen


def test_terms_of_a_sum_have_the_weights_that_they_trained_with(sum_run: tuple[Path, Seen]) -> None:
    run, seen = sum_run[0] / RUN, sum_run[1]
    names = [found.channel for found in selections_of(RunFolder.read(run))]
    assert names == ["weight", "weight of treg", "weight of treg 2"]
    html = make_report(run).html
    assert [c["name"] for c in data_of(html)["channels"] if c["kind"] == "weight"] == names
    assert "The term <code>treg</code> of the objective has its own selection, <code>transform</code>" in html
    outer = values_of(html, "weight")
    for kind, name in (("Transform", "weight of treg"), ("TopFraction", "weight of treg 2")):
        shown = values_of(html, name)
        assert len(seen[kind]) > 20
        for ids, weights in seen[kind].items():
            assert shown[ids] == pytest.approx(weights, abs=1e-6), (name, ids)
            assert all(own for own, weight in zip(outer[ids], weights, strict=True) if weight)
    assert any(weight < 0 for weights in values_of(html, "weight of treg").values() for weight in weights)


def test_a_sum_inside_a_sum_is_named_by_its_path(copied_run: Path) -> None:
    inner = f"{{name: sum, terms: [{{name: dpo}}, {{name: treg, selection: {SIGNED}}}]}}"
    trained(copied_run, f"policy.objective={{name: sum, terms: [{{name: dpo}}, {inner}]}}")
    assert [found.term for found in selections_of(RunFolder.read(RUN))] == ["", "sum/treg"]


def test_the_terminal_shows_the_selection_of_a_term(
    sum_run: tuple[Path, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sum_run[0])
    output = CliRunner().invoke(cli.app, ["show", str(RUN)]).output
    assert "--term treg" in " ".join(output.split())
    output = " ".join(CliRunner().invoke(cli.app, ["show", str(RUN), "--term", "treg"]).output.split())
    assert "the recipe's transform for the term treg" in output
    assert "{in braces} with a negative weight" in output
    assert "{" in output.partition("chosen:")[2]
    shown = shown_pair(RUN, 1, "treg 2")
    assert "top_fraction for the term treg 2" in shown.rule
    with pytest.raises(UserError, match="treg, treg 2") as error:
        shown_pair(RUN, 1, "tdpo")
    assert error.value.code == "unknown-name"


def test_the_page_switches_between_selections_and_leaves_unstored_ones_unmarked(
    opened, sum_run: tuple[Path, Seen], copied_run: Path
) -> None:
    page = opened(make_report(sum_run[0] / RUN).save().resolve())
    assert page.locator("#weightings").is_visible()
    half = page.locator("#sides > div > .text .kept").count()
    assert page.locator(".sides .against").count() == 0
    page.select_option("#weights", "weight of treg")
    assert page.locator("#sides > div > .text .kept").count() == half
    assert page.locator(".sides .against").count() > 0
    assert "weights=weight+of+treg" in page.url
    page.locator("#chosen .token").first.hover()
    assert "weight of treg 2" in (page.locator("#card").text_content() or "")
    trained(copied_run, *ONLINE)
    page = opened(make_report(RUN).save().resolve())
    assert not page.locator("#weightings").is_visible()
    assert page.locator(".sides .kept").count() == 0
    assert page.locator("#kept").text_content() == "No token is marked."
    page.evaluate("change({chosen: '0.5', moved: '1'})")
    assert page.locator(".sides .kept").count() > 0
    page.click("#reset")
    assert page.locator(".sides .kept").count() == 0
