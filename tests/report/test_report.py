"""The contents of a report: pieces of text, scales, the choice of pairs, warnings, and its other forms."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tokenward
from tests.manifests import rewritten
from tokenward import cli
from tokenward.artifacts import read_manifest
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figure, before_after_figures
from tokenward.evaluation.tables import figure_rows, main_note, main_rows
from tokenward.report.channels import other_runs, scale_of
from tokenward.report.charts import bar_chart, line_chart, ticks
from tokenward.report.collect import RunFolder, displacement
from tokenward.report.outcome import outcome, reply_rows, reward_picture
from tokenward.report.page import LARGEST, make_report
from tokenward.report.pairs import PairReader, draw
from tokenward.report.pictures import save_curves, save_picture
from tokenward.report.pieces import (
    SENTENCE,
    WORD,
    breaks,
    piece_ends,
    pieces,
    shared_words,
    token_class,
    words,
)
from tokenward.report.show import by_character, colour, pair_text, shown_pair, visible
from tokenward.report.summary import (
    LISTED,
    curves,
    extreme_tokens,
    provenance,
    reach,
    recipe_of,
    watched_rows,
)
from tokenward.scoring.store import TokenRecord

RUN = Path("runs/quickstart")


@pytest.fixture
def run_folder(finished_run: Path) -> Path:
    return finished_run / RUN


def data_of(html: str) -> dict:
    return json.loads(html.partition('id="data">')[2].partition("</script>")[0])


def record(pieces: list[bytes], eos: int = 0) -> TokenRecord:
    ends = np.cumsum([len(piece) for piece in pieces] + [0] * eos).tolist()
    starts = [0, *ends][: len(pieces)] + [ends[-1] if ends else 0] * eos
    return TokenRecord("0" * 16, list(range(len(ends))), starts, ends, {})


def with_scorer(run: Path, copy: Path, name: str) -> Path:
    """A copy of a run that says it was trained with another scorer."""
    shutil.copytree(run, copy)

    def change(manifest: dict) -> dict:
        manifest["settings"]["scores"]["scorer"] = {"name": name}
        return manifest

    rewritten(copy / "policy", change)
    return copy


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_end_inside_a_character_moves_to_its_end() -> None:
    text = "é👩‍👩!"  # 2 bytes; 4 + 3 + 4 bytes in one character of five units; 1 byte
    assert piece_ends(text, [1, 2, 6, 9, 13, 14]).tolist() == [1, 1, 6, 6, 6, 7]
    raw = text.encode()
    parts = [raw[:1], raw[1:2], raw[2:6], raw[6:9], raw[9:13], raw[13:]]
    assert pieces(text, record(parts, eos=1), {6: "<end>"}) == ["é", "", "👩‍👩", "", "", "!", "<end>"]
    assert pieces("a", record([b"a"], eos=1), {}) == ["a", "[1]"]


def test_classes_of_tokens() -> None:
    found = [token_class(piece, eos=False) for piece in (" good", "Good", "ood", " 12", ".", "\n", "")]
    assert found == [
        "word start", "word start", "inside a word", "number", "punctuation", "white space", "part of a character",
    ]  # fmt: skip
    assert token_class("<|im_end|>", eos=True) == "eos"


def test_words_and_sentences_start_with_the_token_of_their_first_letter() -> None:
    parts = ["It", " was", " go", "od", ".", " So", "\n", "so", "."]
    tokens = record([part.encode() for part in parts], eos=1)
    both = WORD + SENTENCE
    # A line break is the white space before the next word, and the end of a sentence by itself.
    assert breaks("".join(parts), tokens).tolist() == [both, WORD, WORD, 0, 0, both, WORD, SENTENCE, 0, 0]
    begins = breaks("".join(parts), record([part.encode() for part in parts]))
    assert words(parts, begins) == ["It", "was", "good.", "So", "so."]
    # A response that was cut off has the units of the rest.
    assert breaks("one two three", record([b"one", b" tw"])).tolist() == [both, WORD]
    assert breaks("", record([])).tolist() == []


def test_shared_words_keep_their_order() -> None:
    first = ["the", "tea", "was", "good", "and", "hot"]
    second = ["the", "soup", "was", "bad", "and", "hot"]
    assert [tuple(run) for run in shared_words(first, second)] == [(0, 0, 1), (2, 2, 1), (4, 4, 2)]
    assert shared_words(["a"], ["b"]) == shared_words([], []) == []


def test_a_scale_is_symmetric_about_zero_or_about_the_median_of_one_signed_scores() -> None:
    signed = np.concatenate([np.linspace(-1, 1, 99), [50.0, np.nan]])
    zero, limit, centred = scale_of(signed)
    assert (zero, centred) == (0.0, False)
    assert limit == pytest.approx(np.quantile(np.abs(signed[:-1]), 0.98))
    zero, limit, centred = scale_of(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (zero, centred) == (3.0, True)
    assert limit == pytest.approx(2.0)
    assert scale_of(np.zeros(4)) == (0.0, 1.0, False)


def test_pairs_are_drawn_at_random_and_from_both_ends(run_folder: Path, tmp_path: Path) -> None:
    # Random scores contradict about half of the orders.
    reader = PairReader.open(RunFolder.read(with_scorer(run_folder, tmp_path / "run", "random")))
    assert reader is not None
    drawn = draw(reader, 8, sample=24)
    margins = sorted((place.margin for place, _ in reader.places()), reverse=True)
    by_reason = {
        reason: [place for place, found in zip(drawn.places, drawn.reasons, strict=True) if reason in found]
        for reason in ("random", "margin", "wrong")
    }
    assert drawn.total == len(margins) == 24
    assert len(drawn.places) == 8
    assert len(by_reason["random"]) >= 4
    assert by_reason["random"] == drawn.sample[: len(by_reason["random"])]
    assert sorted((place.margin for place in by_reason["margin"]), reverse=True) == margins[:2]
    assert margins[-1] < 0
    assert sorted((place.margin for place in by_reason["wrong"]), reverse=True) == margins[-2:]
    assert len(draw(reader, 200, sample=5).places) == 24
    assert draw(reader, 8, sample=24).places == drawn.places


def test_the_page_says_how_many_pairs_it_shows_and_has_a_largest_size(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html = make_report(run_folder, rows=8).html
    assert len(data_of(html)["comparisons"]) == 8
    assert "8 of the run's 24 pairs" in html
    # The pairs can take LARGEST characters; the rest of the page must fit into 5 MB with them.
    rest = len(html.encode()) - len(json.dumps(data_of(html)["comparisons"]))
    assert LARGEST + 2 * rest < 5_000_000
    monkeypatch.setattr("tokenward.report.page.LARGEST", 5000)
    small = make_report(run_folder, rows=24).html
    assert 0 < len(data_of(small)["comparisons"]) < 24
    assert "24 were chosen, but more would make the page larger" in small


def test_another_run_is_another_channel(run_folder: Path, tmp_path: Path) -> None:
    other = with_scorer(run_folder, tmp_path / "other", "surprisal")
    data = data_of(make_report(run_folder, also=[other]).html)
    assert [channel["name"] for channel in data["channels"] if channel["kind"] == "score"] == [
        "log_ratio", "surprisal", "random", "surprisal of other",
    ]  # fmt: skip
    values = data["comparisons"][0]["responses"][0]["values"]
    assert values["surprisal of other"] == values["surprisal"] != values["log_ratio"]
    (loaded,) = other_runs([other])
    stored = next(iter(loaded.reader.store))
    record = loaded.reader.store[stored]
    assert np.isfinite(loaded.values(record)).all()
    assert np.isnan(loaded.values(record._replace(ids=record.ids[::-1]))).all(), "other tokens"
    for stage in ("scores", "reference", "policy"):
        shutil.rmtree(other / stage)
    assert other_runs([other]) == []


def test_a_change_is_on_one_row_with_its_sides(run_folder: Path) -> None:
    made = {
        f"x/{part}": Figure(value, 0.0, 1.0, 9)
        for part, value in (("before", 1.0), ("after", 3.0), ("change", 2.0))
    }
    assert [row[:4] for row in figure_rows(made)] == [("x/change", "1.000", "3.000", "2.000")]
    figures = RunFolder.read(run_folder).figures()
    rows = {row.name: row for row in figure_rows(figures)}
    change = rows["vader/change"]
    sides = tuple(f"{figures[f'vader/{side}'].value:.3f}" for side in ("before", "after"))
    assert (change.before, change.after) == sides
    assert "vader/before" not in rows
    assert rows["kl/per_token"].before == ""
    assert len(rows) == len(figures) - 2 * sum(name.endswith("/change") for name in figures)


def test_the_main_figures_are_six_with_names_in_words() -> None:
    figures: dict[str, Figure] = {}
    for name, before, after in (
        ("my:metric", 0.25, 0.75),
        ("length", 10.0, 12.0),
        ("ended", 0.5, 0.5),
        ("eval_reward", 0.0, 1.0),
    ):
        figures |= before_after_figures(name, [before] * 4, [after] * 4)
    for name, value in (
        ("kl/per_reply", 2.5),
        ("preference/accuracy", 0.75),
        ("credit/auroc/log_ratio", 0.7),
        ("credit/auroc/random", 0.49),
    ):
        figures[name] = Figure(value, value, value, 8)
    assert [(row.name, row.before, row.after, row.value, row.n) for row in main_rows(figures)] == [
        ("reward (my:metric)", "0.250", "0.750", "0.500", 4),
        ("replies that end", "0.500", "0.500", "0.000", 4),
        ("reply length, tokens", "10.000", "12.000", "2.000", 4),
        ("KL to the start, nats", "", "2.500", "", 8),
        ("preference accuracy", "", "0.750", "", 8),
        ("token AUROC", "", "0.700", "", 8),
    ]  # fmt: skip
    assert "random scores have an AUROC of 0.490" in main_note(figures)
    del figures["my:metric/change"]
    assert main_rows(figures)[0].name == "reward (eval_reward)"


@pytest.mark.parametrize(
    ("change", "words"),
    [((0.2, 0.6), "raised the VADER sentiment of the model's replies from 0.250 to 0.650"),
     ((-0.6, -0.2), "lowered the VADER sentiment of the model's replies from 0.250 to"),
     ((-0.1, 0.3), "did not measurably change the VADER sentiment of the model's replies: 0.250 before")],
)  # fmt: skip
def test_the_page_begins_with_what_changed(copied_run: Path, change: tuple[float, float], words: str) -> None:
    path = RUN / "evaluation" / "metrics.json"
    low, high = change
    middle = (low + high) / 2
    values = {"before": (0.25, 0.2, 0.3), "after": (0.25 + middle, 0.6, 0.7), "change": (middle, low, high)}
    made = {
        f"vader/{part}": dict(zip(("value", "low", "high"), three, strict=True), n=4)
        for part, three in values.items()
    }
    known = json.loads(path.read_text())
    run_kl = known["kl/per_reply"]["value"]
    path.write_text(json.dumps(known | made))
    found = outcome(RunFolder.read(RUN), None)
    assert words in found.sentence
    assert f"{low:.3f} to {high:.3f}, over 4 eval prompts".replace("-", "−") in found.detail
    assert f"Distance from the start: {run_kl:.2g} nats a reply." in found.detail
    assert found.subject == "SePO · model · pairs.jsonl"
    assert found.picture.count("<circle") == 8, "one dot per reply, before and after"


def test_equal_values_have_no_interval(copied_run: Path) -> None:
    path = RUN / "evaluation/metrics.json"
    same = {f"vader/{part}": {"value": 0.2, "low": 0.2, "high": 0.2, "n": 4} for part in ("before", "after")}
    change = {"vader/change": {"value": 0.0, "low": 0.0, "high": 0.0, "n": 4}}
    path.write_text(json.dumps(json.loads(path.read_text()) | same | change))
    found = outcome(RunFolder.read(RUN), None)
    assert "did not measurably change" in found.sentence
    assert "no interval: all are equal, over 4 eval prompts" in found.detail


def test_a_run_that_was_not_evaluated_begins_with_its_scores(copied_run: Path) -> None:
    shutil.rmtree(RUN / "evaluation")
    run = RunFolder.read(RUN)
    reader = PairReader.open(run)
    assert reader is not None
    drawn = draw(reader, 4, sample=4)
    told = [place.margin > 0 for place, _ in reader.places() if place.part == "eval"]
    assert drawn.agreement[0::3] == (sum(told) / len(told), len(told))
    found = outcome(run, drawn.agreement)
    assert (
        found.sentence == f"The scores agree with the preference in {sum(told) / len(told):.0%} of the pairs."
    )
    assert not found.picture
    assert outcome(run, None).sentence == "This run has not been evaluated yet."


def test_replies_come_with_their_prompt_and_reward(run_folder: Path, finished_online: Path) -> None:
    for folder, reward in ((run_folder, "vader"), (finished_online / "runs" / "online", "rouge1")):
        run = RunFolder.read(folder)
        rows, stored = reply_rows(run), run.replies()
        assert [row.prompt for row in rows] == [line["prompt"][-1]["content"] for line in stored]
        values = {
            line["key"]: line["values"]
            for line in run.lines("evaluation", "rows.jsonl")
            if line["kind"] == "prompt"
        }
        for row, line in zip(rows, stored, strict=True):
            for side, when in ((row.before, "before"), (row.after, "after")):
                assert side.text == line[when]
                assert side.value.replace("−", "-") == f"{values[line['key']][f'{reward}/{when}']:.2f}"


def test_the_picture_of_the_reward_shows_both_means_and_every_reply() -> None:
    figures = before_after_figures("x", [0.0, 0.5, 0.5], [1.0, 1.0, 0.4])
    picture = reward_picture("x", figures, [0.0, 0.5, 0.5], [1.0, 1.0, 0.4])
    assert "mean 0.33 before training, 0.80 after, change +0.47" in picture
    assert (picture.count('circle class="before"'), picture.count('circle class="after"')) == (3, 3)
    inside = [float(x) for x in re.findall(r'(?:cx|x)="([-\d.]+)"', picture)]
    assert all(0 <= x <= 400 for x in inside)
    assert "<circle" not in reward_picture("x", figures, [], []), "the means alone"


def test_axes_begin_where_they_should() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-0.9, 0.98) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert ticks(3.0, 3.0) == [2.5, 2.75, 3.0, 3.25, 3.5]
    flat = {"loss": [(1.0, 0.693), (2.0, 0.690)]}
    assert reach("oracle: loss", flat) == (0.0, 0.0)
    chart = line_chart("oracle: loss", flat, x_label="update", y=reach("oracle: loss", flat))
    heights = [float(y) for y in re.findall(r",([\d.]+)", re.findall(r'points="([^"]*)"', chart)[0])]
    assert abs(heights[0] - heights[1]) < 1, "a flat loss is drawn flat"
    assert reach("policy: reward accuracy", flat) == (0.0, 1.0)
    low, high = reach(
        "policy: log-probability of the tokens that train", {"logps/chosen": [(1, -100.0), (2, -101.0)]}
    )
    assert high - low == pytest.approx(10.1), "a tenth of its size"


def test_a_training_that_diverged_is_reported(copied_run: Path) -> None:
    log = [
        {"step": step, "loss": loss}
        for step, loss in enumerate([0.7, 0.6, float("inf"), float("nan")], start=1)
    ]
    write_lines(RUN / "policy" / "history.jsonl", log)
    drawn = dict(curves(RunFolder.read(RUN)))["policy: loss, over the tokens that train"]
    assert drawn == {"loss (2 values are not finite)": [(1.0, 0.7), (2.0, 0.6)]}
    assert "loss (2 values are not finite)" in make_report(RUN).html
    write_lines(RUN / "policy" / "history.jsonl", [{"step": step, "loss": float("nan")} for step in (1, 2)])
    assert "policy: loss" not in make_report(RUN).html


def test_the_recipe_is_joined_from_the_manifests(run_folder: Path) -> None:
    recipe = recipe_of(RunFolder.read(run_folder))
    assert recipe["policy"]["objective"] == {"name": "sepo", "gamma": 2.0}
    assert recipe["data"]["eval"] == 0.3
    assert recipe["data"]["pairs"] == "best_worst"
    assert recipe["oracle"]["training"]["max_steps"] == 6


def test_replies_during_training_are_shown_unless_the_evaluation_has_them(copied_run: Path) -> None:
    samples = RUN / "policy" / "samples.jsonl"
    lines = [
        {"step": step, "key": key, "prompt": f"<b>{key}</b>", "reply": f"{key} at {step}", "ended": True}
        for step in (0, 5, 10, 15, 20, 25, 30, 33)
        for key in ("tea", "cup")
    ]
    write_lines(samples, lines)
    (look,) = [look for look in watched_rows(RunFolder.read(RUN)) if look.stage == "policy"]
    assert look.steps == [0, 10, 20, 33]
    assert look.rows[1] == ("<b>cup</b>", ["cup at 0", "cup at 10", "cup at 20", "cup at 33"])
    html = make_report(RUN).html
    assert "&lt;b&gt;tea&lt;/b&gt;" in html
    assert "cup at 20" in html
    assert "cup at 25" not in html
    lines = [
        {"step": step, "key": str(number), "prompt": "p", "reply": reply[side], "ended": True}
        for number, reply in enumerate(RunFolder.read(RUN).replies())
        for step, side in ((0, "before"), (6, "after"))
    ]
    write_lines(samples, lines)
    assert "policy" not in [look.stage for look in watched_rows(RunFolder.read(RUN))]
    lines[-1]["reply"] += "!"
    write_lines(samples, lines)
    assert "policy" in [look.stage for look in watched_rows(RunFolder.read(RUN))]


def test_a_chart_holds_what_is_measured_over_the_same_tokens(copied_run: Path) -> None:
    """The oracle trains on every token, as eval rows are measured; the policy on those that are selected."""
    logged = [{"step": step, "loss": 1.0, "eval_loss": 2.0, "kept/chosen": 0.3} for step in (1, 2, 3)]
    for stage in ("oracle", "policy"):
        write_lines(RUN / stage / "history.jsonl", logged)
    found = {title: list(series) for title, series in curves(RunFolder.read(RUN)) if "loss" in title}
    assert found == {
        "oracle: loss": ["loss", "eval_loss"],
        "policy: loss, over the tokens that train": ["loss"],
        "policy: loss of the eval rows, over all tokens": ["eval_loss"],
    }


def test_no_token_is_both_among_the_highest_and_the_lowest() -> None:
    for count in (1, 2, 7, 2 * LISTED, 2 * LISTED + 5):
        raised, lowered = extreme_tokens({f"t{number:02d}": [float(number)] * 5 for number in range(count)})
        highest = [f"t{number:02d}" for number in range(count - 1, -1, -1)]
        assert [token.text for token in raised] == highest[: min(LISTED, count - count // 2)]
        assert [token.text for token in lowered] == highest[::-1][: min(LISTED, count // 2)]


def test_the_page_says_where_the_scores_come_from(run_folder: Path, tmp_path: Path) -> None:
    run = RunFolder.read(run_folder)
    sentence = provenance(run)
    oracle, template = run.manifests["oracle"], run.manifests["reference"].inputs["template"]
    assert f"oracle (objective dpo, {oracle.identity})" in sentence
    assert f"template chat ({template}), in float32." in sentence
    assert "reference model (" in sentence, "only the folder's name of a local model"
    assert sentence in make_report(run_folder).html
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    shutil.rmtree(copy / "scores")
    assert provenance(RunFolder.read(copy)) == ""


def test_stages_that_do_not_fit_together_are_named(copied_run: Path) -> None:
    assert RunFolder.read(RUN).stale() == []
    tokenward.run(copied_run, ["oracle.training.max_steps=3"], last="scores", quiet=True)
    assert any(
        "policy was made from an older version of scores" in line for line in RunFolder.read(RUN).stale()
    )
    assert "policy was made from an older version of scores" in make_report(RUN).html


def test_displacement_is_reported_from_alarm_figure_or_log(copied_run: Path) -> None:
    policy, metrics = RUN / "policy", RUN / "evaluation" / "metrics.json"
    log = policy / "history.jsonl"
    figures = json.loads(metrics.read_text())
    alarm = {"last": -0.75, "lowest": -0.9, "margin": 0.5, "warned_at": 12}
    facts = read_manifest(policy).facts
    rewritten(policy, lambda values: values | {"facts": facts | {"displacement": alarm}})
    warning = displacement(RunFolder.read(RUN))
    assert all(word in warning for word in ("update 12", "0.5 nats", "-0.75"))
    rewritten(policy, lambda values: values | {"facts": facts})

    def with_figure(high: float) -> str:
        figure = {"value": -0.25, "low": -0.3, "high": high, "n": 7}
        metrics.write_text(json.dumps(figures | {"logps/chosen_change_per_token": figure}))
        return displacement(RunFolder.read(RUN))

    assert with_figure(0.1) == ""
    assert "by 0.250 nats per token" in with_figure(-0.2)
    assert "became less likely" in make_report(RUN).html
    metrics.unlink()
    falling = [{"step": step, "logps/chosen": -10.0 - step} for step in range(8)]
    write_lines(log, falling)
    assert "from -10.50 to -16.50" in displacement(RunFolder.read(RUN))
    write_lines(log, falling[::-1])
    assert displacement(RunFolder.read(RUN)) == ""


def test_a_run_without_a_policy_is_reported_too(copied_run: Path) -> None:
    for stage in ("policy", "evaluation"):
        shutil.rmtree(RUN / stage)
    html = make_report(RUN).html
    assert "The run has no policy yet" in html
    assert "The policy has not been evaluated yet." in html
    assert 'id="figures"' not in html
    assert "weight" not in {channel["name"] for channel in data_of(html)["channels"]}
    shutil.rmtree(RUN / "scores")
    (RUN / "oracle" / "preview.json").unlink()
    bare = make_report(RUN).html
    assert "<script>" not in bare
    assert "script-src 'none'" in bare
    with pytest.raises(UserError) as error:
        shown_pair(RUN, 1)
    assert error.value.code == "no-pairs"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as error:
            make_report(folder)
        assert error.value.code == "not-a-run"


def test_every_run_ends_with_its_report_and_a_notebook_shows_it_in_a_frame(
    run_folder: Path, tmp_path: Path
) -> None:
    assert data_of((run_folder / "report" / "index.html").read_text())["total"] == 24
    report = make_report(run_folder)
    frame = report._repr_html_()
    assert unescape(frame.partition('srcdoc="')[2].partition('"')[0]) == report.html
    assert report.save(tmp_path / "new" / "page.html").read_text() == report.html
    assert make_report(run_folder).save().read_text() == report.html
    assert report.html.rstrip().endswith("</html>")
    assert str(run_folder) not in report.html, "no path of the machine that made it"


def test_charts_escape_words_and_skip_missing_values() -> None:
    chart = bar_chart("a < b", ["<i>", "x"], {"one": [1.0, None], "two": [-1.0, 2.0]})
    assert chart.count("<rect") == 3
    assert "<i>" not in chart
    assert "a &lt; b" in chart
    assert line_chart("nothing", {"one": []}, x_label="") == ""
    assert 'points="56.0,146.0 408.0,12.0"' in line_chart("t", {"one": [(0, 0), (1, 1)]}, x_label="")

    def heights(labels: list[str]) -> set[str]:
        chart = str(bar_chart("t", labels, {"a": [1.0] * len(labels)}))
        return {re.search(rf'y="([\d.]+)"[^>]*>{label}', chart)[1] for label in labels}  # type: ignore[index]

    assert len(heights(["one", "two", "three"])) == 1
    assert len(heights(["part of a character", "punctuation", "word start", "inside a word"])) == 2


def test_a_pair_in_the_terminal(run_folder: Path) -> None:
    shown = shown_pair(run_folder, 3)
    text = pair_text(shown)
    first = [token for token in shown.sides[0] if token.kept]
    assert f"[{first[0].text}]" in text.plain
    assert "pair 3 of 24" in text.plain
    backgrounds = {str(span.style) for span in text.spans if "on rgb" in str(span.style)}
    assert any("on rgb(63,143,214)" in style for style in backgrounds), "the strongest blue"
    assert pair_text(shown, light=True).plain == text.plain
    assert colour(0.0, (1, 2, 3)) == colour(float("nan"), (1, 2, 3)) == (1, 2, 3)
    assert visible("a\nb\t\u202e\u200d") == "a↵\nb⇥\t‹U+202E›\u200d"
    for number in (0, 25):
        with pytest.raises(UserError, match="from 1 to 24") as error:
            shown_pair(run_folder, number)
        assert error.value.code == "out-of-range"


def test_small_scores_are_shown_with_more_digits(run_folder: Path) -> None:
    plain = shown_pair(run_folder, 3)
    sides = tuple([token._replace(score=token.score * 1e-4) for token in side] for side in plain.sides)
    scale = {"zero": plain.zero * 1e-4, "limit": 0.52e-4}
    lines = pair_text(plain._replace(sides=sides, **scale)).plain.splitlines()
    total = sum(token.score for token in sides[0])
    assert f"chosen {total:+.6f}" in lines[1]
    assert lines[2].startswith(f"{scale['zero'] - scale['limit']:+.6f} ")
    figures = {f"tiny/{part}": Figure(0.00031, -0.0001, 0.0005, 9) for part in ("before", "after", "change")}
    (row,) = figure_rows(figures)
    assert row[1:5] == ("0.00031", "0.00031", "0.00031", "-0.00010 .. 0.00050")


def test_tokens_that_share_a_character_are_shown_as_one(odd_run: Path, tmp_path: Path) -> None:
    pairs = [shown_pair(odd_run, number) for number in range(1, 5)]
    side = next(pair.sides[0] for pair in pairs if "👩" in pair.pair.comparison.responses[0])
    shared = side[: 1 + next(place for place, token in enumerate(side[1:]) if token.text)]
    joined = by_character(side)
    assert len(shared) > 5
    assert joined[0].text == "👩‍👩‍👧‍👦"
    assert joined[0].score == pytest.approx(sum(token.score for token in shared) / len(shared))
    assert joined[0].kept == any(token.kept for token in shared)
    assert "".join(token.text for token in joined) == "".join(token.text for token in side)
    for number, pair in enumerate(pairs):  # markup, marks and split characters can be drawn
        save_picture(pair, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes()[1:4] == b"PNG"


def test_pictures_of_a_pair_and_of_the_curves(run_folder: Path, copied_run: Path, tmp_path: Path) -> None:
    save_picture(shown_pair(run_folder, 3), tmp_path / "pair.svg")
    assert "#3f8fd6" in (tmp_path / "pair.svg").read_text()
    with pytest.raises(UserError) as error:
        save_picture(shown_pair(run_folder, 3), tmp_path / "pair.docx")
    assert error.value.code == "cannot-write"
    charts = len(list(curves(RunFolder.read(run_folder))))
    assert charts > 2
    assert save_curves(run_folder, tmp_path / "curves.svg") == charts
    text = (tmp_path / "curves.svg").read_text()
    assert text.count('id="axes_') == charts
    assert "<!-- oracle: loss -->" in text
    assert "<!-- rewards/rejected -->" in text
    for stage in ("oracle", "policy"):
        (RUN / stage / "history.jsonl").unlink()
    with pytest.raises(UserError) as error:
        save_curves(RUN, tmp_path / "curves.svg")
    assert error.value.code == "no-history"


def test_the_commands_take_a_folder_or_a_recipe(copied_run: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    for target in (str(RUN), str(copied_run)):
        assert call("report", target, "--rows", "6") == "report: runs/quickstart/report/index.html"
        assert len(data_of((RUN / "report" / "index.html").read_text())["comparisons"]) <= 6
        assert "pair 2 of 24" in call("show", target, "--row", "2")
    picture, curve = tmp_path / "pair.png", tmp_path / "curves.png"
    assert " charts" in call("show", str(RUN), "--png", str(picture), "--curves", str(curve))
    assert picture.read_bytes()[1:4] == curve.read_bytes()[1:4] == b"PNG"
