"""What a report is made from: pieces of text, scales, the choice of pairs, words about displacement, other forms."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tokenward
from tokenward import cli
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figure
from tokenward.report.channels import other_runs, scale_of
from tokenward.report.charts import bar_chart, line_chart
from tokenward.report.collect import RunFolder, displacement
from tokenward.report.drawing import pair_text, save_picture
from tokenward.report.page import make_report, write_report
from tokenward.report.pairs import PairReader, draw
from tokenward.report.pieces import piece_ends, pieces, token_class
from tokenward.report.single import by_character, colour, shown_pair, visible
from tokenward.report.summary import figure_rows, provenance, recipe_of, watched_rows
from tokenward.scoring.store import TokenRecord

RUN = Path("runs/quickstart")


@pytest.fixture
def run_folder(finished_run: Path) -> Path:
    return finished_run / RUN


def data_of(html: str) -> dict:
    return json.loads(html.partition('id="data">')[2].partition("</script>")[0])


def record(ends: list[int]) -> TokenRecord:
    return TokenRecord("0" * 16, list(range(len(ends))), [0, *ends[:-1]], ends, {})


def test_an_end_inside_a_character_moves_to_its_end() -> None:
    text = "é👩‍👩!"  # 2 bytes; 4 + 3 + 4 bytes in one character of five units; 1 byte
    assert piece_ends(text, [1, 2, 6, 9, 13, 14]).tolist() == [1, 1, 6, 6, 6, 7]
    assert pieces(text, record([1, 2, 6, 9, 13, 14, 14]), {6: "<end>"}) == [
        "é", "", "👩‍👩", "", "", "!", "<end>",
    ]  # fmt: skip
    assert pieces("a", record([1, 1]), {}) == ["a", "[1]"]


def test_kinds_of_tokens() -> None:
    found = [token_class(piece, eos=False) for piece in (" good", "Good", "ood", " 12", ".", "\n", "")]
    assert found == [
        "word begins", "word begins", "word goes on", "number", "punctuation", "white space", "rest of a character",
    ]  # fmt: skip
    assert token_class("<|im_end|>", eos=True) == "end of turn"


def test_a_scale_is_symmetric_about_zero_or_about_the_median_of_one_signed_scores() -> None:
    signed = np.concatenate([np.linspace(-1, 1, 99), [50.0, np.nan]])
    zero, limit, centred = scale_of(signed)
    assert (zero, centred) == (0.0, False)
    assert limit == pytest.approx(np.quantile(np.abs(signed[:-1]), 0.98))
    zero, limit, centred = scale_of(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (zero, centred) == (3.0, True)
    assert limit == pytest.approx(2.0)
    assert scale_of(np.zeros(4)) == (0.0, 1.0, False)


def test_pairs_are_drawn_at_random_and_from_both_ends(run_folder: Path) -> None:
    reader = PairReader.open(RunFolder.read(run_folder))
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
    assert by_reason["random"] == drawn.sample[: len(by_reason["random"])]  # nothing but the dice chose them
    assert sorted((place.margin for place in by_reason["margin"]), reverse=True) == margins[:2]
    worst = [margin for margin in margins if margin < 0][-2:]
    assert sorted((place.margin for place in by_reason["wrong"]), reverse=True) == worst
    assert len(draw(reader, 200, sample=5).places) == 24
    again = draw(reader, 8, sample=24)
    assert again.places == drawn.places


def test_pairs_whose_scores_contradict_the_order_are_shown(run_folder: Path, tmp_path: Path) -> None:
    """Random scores contradict about half of the orders."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    manifest = json.loads((copy / "policy" / "manifest.json").read_text())
    manifest["settings"]["scores"]["scorer"] = {"name": "random"}
    (copy / "policy" / "manifest.json").write_text(json.dumps(manifest))
    reader = PairReader.open(RunFolder.read(copy))
    assert reader is not None
    drawn = draw(reader, 12, sample=5)
    wrong = [p for p, reasons in zip(drawn.places, drawn.reasons, strict=True) if "wrong" in reasons]
    assert len(wrong) == 3
    assert all(place.margin < 0 for place in wrong)


def test_the_page_says_how_many_pairs_it_shows_and_ends_where_it_would_grow_too_large(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html = make_report(run_folder, rows=8).html
    data = data_of(html)
    assert len(data["comparisons"]) == 8
    assert f"{len(data['comparisons'])} of the run's 24 pairs" in html
    monkeypatch.setattr("tokenward.report.page.LARGEST", 5000)
    small = make_report(run_folder, rows=24).html
    assert 0 < len(data_of(small)["comparisons"]) < 24
    assert "24 were chosen; the page ends where its size would pass" in " ".join(small.split())


def test_a_full_page_stays_under_five_megabytes(run_folder: Path) -> None:
    """The pairs may take so much; what the page holds beside them, on a real page, must fit into the rest."""
    from tokenward.report.page import LARGEST

    html = make_report(run_folder).html
    pairs = len(json.dumps(data_of(html)["comparisons"]))
    beside = len(html.encode()) - pairs
    assert 0 < pairs < LARGEST
    assert LARGEST + 2 * beside < 5_000_000


def test_a_further_run_is_a_further_channel(run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    manifest = json.loads((other / "policy" / "manifest.json").read_text())
    manifest["settings"]["scores"]["scorer"] = {"name": "surprisal"}
    (other / "policy" / "manifest.json").write_text(json.dumps(manifest))
    data = data_of(make_report(run_folder, also=[other]).html)
    assert [channel["name"] for channel in data["channels"] if channel["kind"] == "score"] == [
        "log_ratio", "surprisal", "random", "surprisal of other",
    ]  # fmt: skip
    values = data["comparisons"][0]["responses"][0]["values"]
    assert values["surprisal of other"] == values["surprisal"] != values["log_ratio"]
    for stage in ("scores", "reference", "policy"):
        shutil.rmtree(other / stage)
    assert other_runs([other]) == []


def test_figures_pair_a_change_with_its_sides(run_folder: Path) -> None:
    figures = RunFolder.read(run_folder).figures()
    rows = {row.name: row for row in figure_rows(figures)}
    change = rows["vader/change"]
    assert (change.before, change.after) == tuple(
        f"{figures[f'vader/{s}'].value:.3f}" for s in ("before", "after")
    )
    assert "vader/before" not in rows
    assert rows["kl/per_token"].before == ""
    assert len(rows) == len(figures) - 2 * sum(name.endswith("/change") for name in figures)


def test_the_recipe_is_put_together_from_the_manifests(run_folder: Path) -> None:
    recipe = recipe_of(RunFolder.read(run_folder))
    assert recipe["policy"]["objective"] == {"name": "sepo", "gamma": 2.0}
    assert recipe["data"]["eval"] == 0.3
    assert recipe["data"]["pairs"] == "best_worst"
    assert recipe["oracle"]["training"]["max_steps"] == 6


def test_replies_while_training_stand_side_by_side(copied_run: Path) -> None:
    lines = [
        {"step": step, "key": key, "prompt": f"<b>{key}</b>", "reply": f"{key} at {step}", "ended": True}
        for step in (0, 5, 10, 15, 20, 25, 30, 33)
        for key in ("tea", "cup")
    ]
    (RUN / "policy" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (look,) = [look for look in watched_rows(RunFolder.read(RUN)) if look.stage == "policy"]
    assert look.steps == [0, 10, 20, 33]
    assert look.rows == [
        ("<b>tea</b>", ["tea at 0", "tea at 10", "tea at 20", "tea at 33"]),
        ("<b>cup</b>", ["cup at 0", "cup at 10", "cup at 20", "cup at 33"]),
    ]
    html = make_report(RUN).html
    assert "&lt;b&gt;tea&lt;/b&gt;" in html
    assert "cup at 20" in html
    assert "cup at 25" not in html


def test_replies_that_the_evaluation_shows_are_not_shown_again(copied_run: Path) -> None:
    evaluated = RunFolder.read(RUN).replies()
    lines = [
        {"step": step, "key": str(number), "prompt": "p", "reply": reply[side], "ended": True}
        for number, reply in enumerate(evaluated)
        for step, side in ((0, "before"), (6, "after"))
    ]
    samples = RUN / "policy" / "samples.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "policy" not in [look.stage for look in watched_rows(RunFolder.read(RUN))]
    lines[-1]["reply"] += "!"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "policy" in [look.stage for look in watched_rows(RunFolder.read(RUN))]


def test_what_changed_stands_before_everything_else(copied_run: Path) -> None:
    html = make_report(RUN).html
    first = html.partition('id="in-short"')[2].partition("</p>")[0]
    figures = {row.name: row for row in figure_rows(RunFolder.read(RUN).figures())}
    change = figures["length/change"]
    assert (
        f"<b>length</b> {change.before} → {change.after}, change {change.value} ({change.interval}" in first
    )
    assert "credit" not in first
    assert html.index('id="in-short"') < html.index('id="comparisons"')
    (RUN / "evaluation" / "metrics.json").write_text("{}")
    assert 'id="in-short"' not in make_report(RUN).html


def test_of_few_tokens_none_is_both_raised_and_lowered() -> None:
    from tokenward.report.summary import BOTH, LISTED, _halves, _Sums

    for count in (1, 2, 7, 2 * LISTED, 2 * LISTED + 5):
        sums = _Sums()
        for number in range(count):
            for _ in range(5):
                sums.add(f"t{number:02d}", BOTH, float(number))
        raised, lowered = _halves(sums)
        assert [token.text for token in raised] == [
            f"t{number:02d}" for number in range(count - 1, -1, -1)[: min(LISTED, count - count // 2)]
        ]
        assert [token.text for token in lowered] == [
            f"t{number:02d}" for number in range(min(LISTED, count // 2))
        ]


def test_long_labels_take_turns_on_two_lines_and_short_ones_share_one() -> None:
    def heights(labels: list[str]) -> set[str]:
        chart = str(bar_chart("t", labels, {"a": [1.0] * len(labels)}))
        return {
            re.search(r'y="([\d.]+)"[^>]*>' + label, chart)[1]  # pyright: ignore[reportOptionalSubscript]
            for label in labels
        }

    assert len(heights(["one", "two", "three"])) == 1
    assert len(heights(["rest of a character", "punctuation", "word begins", "word goes on"])) == 2


def test_the_page_says_what_the_scores_are_made_with(run_folder: Path, tmp_path: Path) -> None:
    run = RunFolder.read(run_folder)
    said = provenance(run)
    oracle, template = run.manifests["oracle"], run.manifests["reference"].inputs["template"]
    assert f"oracle (objective dpo, {oracle.fingerprint})" in said
    assert f"template chat ({template}), in float32." in said
    # Of a model on disk only the folder's name.
    assert "reference model (" in said
    assert said in make_report(run_folder).html
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    shutil.rmtree(copy / "scores")
    assert provenance(RunFolder.read(copy)) == ""


def test_stages_that_do_not_fit_together_are_named(copied_run: Path) -> None:
    assert RunFolder.read(RUN).stale() == []
    tokenward.run(copied_run, ["oracle.training.max_steps=3"], last="scores", quiet=True)
    assert any("policy was made from another scores" in line for line in RunFolder.read(RUN).stale())
    assert "policy was made from another scores" in make_report(RUN).html


def test_the_alarm_of_the_training_is_repeated(copied_run: Path) -> None:
    path = RUN / "policy" / "manifest.json"
    manifest = json.loads(path.read_text())
    facts = {"last": -0.75, "lowest": -0.9, "margin": 0.5, "warned_at": 12}
    path.write_text(json.dumps(manifest | {"facts": manifest["facts"] | {"displacement": facts}}))
    said = displacement(RunFolder.read(RUN))
    assert "went off at update 12, 0.5 nats a token below the start" in said
    assert "were at -0.75" in said


def test_displacement_is_said_in_words_where_the_figure_says_it(copied_run: Path) -> None:
    path = RUN / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    figure = {"value": -0.25, "low": -0.3, "high": -0.2, "n": 7}
    path.write_text(json.dumps(metrics | {"logps/chosen_change_per_token": figure}))
    assert "changed by -0.250 nats a token" in displacement(RunFolder.read(RUN))
    assert "became less likely" in make_report(RUN).html
    path.write_text(json.dumps(metrics | {"logps/chosen_change_per_token": figure | {"high": 0.1}}))
    assert displacement(RunFolder.read(RUN)) == ""
    path.unlink()
    log = RUN / "policy" / "history.jsonl"
    falling = [{"step": step, "logps/chosen": -10.0 - step} for step in range(8)]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in falling))
    assert "went from -10.50" in displacement(RunFolder.read(RUN))
    log.write_text("".join(json.dumps(entry) + "\n" for entry in reversed(falling)))
    assert displacement(RunFolder.read(RUN)) == ""


def test_a_run_without_a_policy_is_reported_too(copied_run: Path) -> None:
    for stage in ("policy", "evaluation"):
        shutil.rmtree(RUN / stage)
    html = make_report(RUN).html
    assert "The run has no policy yet" in html
    assert "weight" not in {channel["name"] for channel in data_of(html)["channels"]}
    shutil.rmtree(RUN / "scores")
    bare = make_report(RUN).html
    assert "<script>" not in bare
    assert "script-src 'none'" in bare
    with pytest.raises(UserError, match="has no scores"):
        shown_pair(RUN, 1)


def test_other_selections_are_named_and_their_weights_shown(copied_run: Path) -> None:
    tokenward.run(copied_run, ["policy.selection={name: threshold, above: 0.1}"], last="policy", quiet=True)
    html = make_report(RUN).html
    assert "The recipe selects by <code>threshold</code>" in html
    assert "weight" in {channel["name"] for channel in data_of(html)["channels"]}
    selection = "policy.selection={name: top_fraction, scope: dataset}"
    tokenward.run(copied_run, [selection], last="policy", quiet=True)
    html = make_report(RUN).html
    assert "takes its shares over a dataset" in html
    assert "weight" not in {channel["name"] for channel in data_of(html)["channels"]}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished stage"):
        make_report(tmp_path)
    with pytest.raises(UserError, match="no folder here"):
        make_report(tmp_path / "nowhere")


def test_every_run_ends_with_its_report(finished_run: Path) -> None:
    page = finished_run / RUN / "report" / "index.html"
    assert data_of(page.read_text())["total"] == 24


def test_the_page_in_a_notebook_is_in_a_frame_of_its_own(run_folder: Path, tmp_path: Path) -> None:
    from html import unescape

    report = make_report(run_folder)
    shown = report._repr_html_()
    assert unescape(shown.partition('srcdoc="')[2].partition('"')[0]) == report.html
    assert report.save(tmp_path / "new" / "page.html").read_text() == report.html


def test_charts_escape_their_words_and_skip_what_is_not_there() -> None:
    chart = bar_chart("a < b", ["<i>", "x"], {"one": [1.0, None], "two": [-1.0, 2.0]})
    assert chart.count("<rect") == 3
    assert "<i>" not in chart
    assert "a &lt; b" in chart
    assert line_chart("nothing", {"one": []}, x_label="") == ""
    assert 'points="56.0,146.0 408.0,12.0"' in line_chart("t", {"one": [(0, 0), (1, 1)]}, x_label="")


def test_a_pair_in_the_terminal(run_folder: Path) -> None:
    shown = shown_pair(run_folder, 3)
    text = pair_text(shown)
    first = [token for token in shown.sides[0] if token.kept]
    assert f"[{first[0].text}]" in text.plain
    assert "pair 3 of 24" in text.plain
    grounds = {str(span.style) for span in text.spans if "on rgb" in str(span.style)}
    assert any("on rgb(63,143,214)" in style for style in grounds)  # the strongest blue, where the scale ends
    assert pair_text(shown, light=True).plain == text.plain
    assert colour(0.0, (1, 2, 3)) == colour(float("nan"), (1, 2, 3)) == (1, 2, 3)
    assert visible("a\nb\t\u202e\u200d") == "a↵\nb⇥\t‹U+202E›\u200d"
    for number in (0, 25):
        with pytest.raises(UserError, match="from 1 to 24"):
            shown_pair(run_folder, number)


def test_scores_of_a_small_scale_are_not_shown_as_nothing(run_folder: Path) -> None:
    """The same pair with scores a ten-thousandth as large: the same digits, further behind the point."""
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


def test_tokens_that_share_a_character_are_shown_as_one(odd_run: Path) -> None:
    pairs = [shown_pair(odd_run, number) for number in range(1, 5)]
    side = next(pair.sides[0] for pair in pairs if "👩" in pair.pair.comparison.responses[0])
    shared = side[: 1 + next(place for place, token in enumerate(side[1:]) if token.text)]
    joined = by_character(side)
    assert len(shared) > 5
    assert joined[0].text == "👩‍👩‍👧‍👦"
    assert joined[0].score == pytest.approx(sum(token.score for token in shared) / len(shared))
    assert joined[0].kept == any(token.kept for token in shared)
    assert "".join(token.text for token in joined) == "".join(token.text for token in side)


def test_a_pair_as_a_picture(run_folder: Path, odd_run: Path, tmp_path: Path) -> None:
    save_picture(shown_pair(run_folder, 3), tmp_path / "pair.svg")
    assert "63.1" in (tmp_path / "pair.svg").read_text() or "#3f8fd6" in (tmp_path / "pair.svg").read_text()
    for number in range(1, 5):
        save_picture(shown_pair(odd_run, number), tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
    with pytest.raises(UserError, match="cannot be written"):
        save_picture(shown_pair(run_folder, 3), tmp_path / "pair.docx")


def test_training_curves_as_one_picture(run_folder: Path, copied_run: Path, tmp_path: Path) -> None:
    from tokenward.report.summary import curves, save_curves

    charts = len(list(curves(RunFolder.read(run_folder))))
    assert charts > 2
    picture = tmp_path / "curves.svg"
    assert save_curves(run_folder, picture) == charts
    text = picture.read_text()
    assert text.count('id="axes_') == charts
    assert "<!-- oracle: loss -->" in text
    assert "<!-- rewards/rejected -->" in text
    result = CliRunner().invoke(cli.app, ["show", str(RUN), "--curves", str(tmp_path / "c.png")])
    assert f"{charts} charts" in " ".join(result.output.split())
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
    for stage in ("oracle", "policy"):
        (RUN / stage / "history.jsonl").unlink()
    with pytest.raises(UserError, match=r"no stage of .* has a history"):
        save_curves(RUN, picture)


def test_the_verbs_take_a_folder_or_a_recipe(copied_run: Path, tmp_path: Path) -> None:
    for target in (str(RUN), str(copied_run)):
        result = CliRunner().invoke(cli.app, ["report", target, "--rows", "6"])
        assert (result.exit_code, result.output) == (0, "report: runs/quickstart/report/index.html\n")
        assert len(data_of((RUN / "report" / "index.html").read_text())["comparisons"]) <= 6
        shown = CliRunner().invoke(cli.app, ["show", target, "--row", "2"])
        assert "pair 2 of 24" in shown.output
    picture = tmp_path / "pair.png"
    assert CliRunner().invoke(cli.app, ["show", str(RUN), "--png", str(picture)]).exit_code == 0
    assert picture.read_bytes()[1:4] == b"PNG"


def test_the_file_of_a_report_is_whole(run_folder: Path) -> None:
    page = write_report(run_folder)
    assert page == run_folder / "report" / "index.html"
    assert page.read_text().rstrip().endswith("</html>")
    assert str(run_folder) not in page.read_text()  # no path of the machine that made it
