"""The page in a real browser: what it selects, what it shows, how it is used."""

import json
import re
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from tests.report.conftest import ODD
from tokenward.report.channels import scored_tokens
from tokenward.report.collect import RunFolder
from tokenward.report.page import make_report
from tokenward.report.pairs import PairReader, scores_of
from tokenward.selection import ScoredTokens, SideRule, TopFraction, stable_noise
from tokenward.selection.weights import weights_of

SETTINGS = [
    TopFraction(),
    TopFraction(chosen=SideRule(fraction=0.7), rejected=SideRule(fraction=0.45), count="ceil", eos="none"),
    TopFraction(chosen=SideRule(fraction=1 / 3), rejected=SideRule(fraction=0.01), count="round"),
    TopFraction(chosen=SideRule(fraction=0.7), count="float", minimum=0, first_token=False),
    TopFraction(chosen=SideRule(direction="magnitude"), rejected=SideRule(direction="top"), eos="chosen"),
    TopFraction(chosen=SideRule(fraction=1.0), rejected=SideRule(fraction=0.15), eos="rejected", minimum=4),
    TopFraction(eos="always", first_token=False),
]


def reader_of(finished_run: Path) -> PairReader:
    reader = PairReader.open(RunFolder.read(finished_run / "runs" / "quickstart"))
    assert reader is not None
    return reader


def settings_of(rule: TopFraction) -> dict:
    return {
        "count": rule.count, "minimum": rule.minimum, "first_token": rule.first_token, "eos": rule.eos,
        "ties": rule.ties, "denominator": 10**9,
        "chosen": {"fraction": rule.chosen.fraction, "direction": rule.chosen.direction or "top"},
        "rejected": {"fraction": rule.rejected.fraction, "direction": rule.rejected.direction or "bottom"},
    }  # fmt: skip


def test_the_page_selects_what_the_library_selects(opened, page_path: Path, finished_run: Path) -> None:
    page, reader = opened(page_path), reader_of(finished_run)
    for rule in SETTINGS:
        picked = page.evaluate(
            """rules => Object.fromEntries(pairs.map(pair => [pair.number, pair.responses.map((response, side) =>
                 [...select(response, response.values.log_ratio, SIDES[side], rules)])]))""",
            settings_of(rule),
        )
        for place, scores in reader.places():
            weights = rule(scored_tokens(reader.pair(place), scores))
            chosen, rejected = picked.pop(str(place.number))
            assert chosen + rejected == weights.int().tolist(), rule
        assert not picked


def test_the_page_selects_segments_as_the_library_does(opened, page_path: Path, finished_run: Path) -> None:
    """Two tokens at a time, as if one token of another tokenizer's oracle covered both."""
    page, reader = opened(page_path), reader_of(finished_run)
    for rule in SETTINGS:
        picked = page.evaluate(
            """rules => Object.fromEntries(pairs.map(pair => [pair.number, pair.responses.map((response, side) => {
                 const joint = Int32Array.from(response.ids, (_, i) => Math.floor(i / 2));
                 return [...select({ ...response, joint }, response.values.log_ratio, SIDES[side], rules)]; })]))""",
            settings_of(rule),
        )
        for place, scores in reader.places():
            tokens = scored_tokens(reader.pair(place), scores)
            joint = torch.cat([torch.arange(len(side)) // 2 for side in scores])
            chosen, rejected = picked[str(place.number)]
            assert chosen + rejected == weights_of(rule, tokens._replace(joint=joint)).int().tolist(), rule


@pytest.mark.parametrize("ties", ["earliest", "random"])
def test_ties_and_missing_scores_are_handled_as_in_the_library(opened, page_path: Path, ties) -> None:
    scores = torch.tensor([1.0, 0.0, float("nan"), 1.0, -0.0, 0.0, 1.0, float("-inf")])
    tokens = ScoredTokens(
        scores, torch.zeros(8, dtype=torch.long), torch.tensor([0]), torch.tensor([0]),
        torch.arange(8) == 7, torch.tensor([12345]),
    )  # fmt: skip
    page = opened(page_path)
    for fraction in (0.1, 0.3, 0.5, 0.6, 0.9):
        rule = TopFraction(chosen=SideRule(fraction=fraction), ties=ties, seed=3)
        noise = torch.argsort(torch.argsort(stable_noise(tokens, 4))).tolist()
        picked = page.evaluate(
            """([rules, text, noise]) => {
                 const scores = text.map(x => x === "nan" ? NaN : Number(x));
                 const response = {eos: 1, values: {"noise of ties": noise}};
                 return [...select(response, scores, "chosen", rules)]; }""",
            [
                settings_of(rule),
                [str(x).replace("-inf", "-Infinity") for x in scores.tolist()],
                noise,
            ],
        )
        assert picked == rule(tokens).int().tolist(), fraction


def test_decimals_are_exact_as_in_the_library(opened, page_path: Path) -> None:
    page = opened(page_path)
    for value in (0.3, 1.0, 1 / 3, 0.1234567891234, 1e-7, 0.5112747213686085, 0.9666063677707588):
        exact = Fraction(str(value)).limit_denominator(10**9)
        found = page.evaluate("value => exactFraction(value, 1e9)", value)
        assert found == [exact.numerator, exact.denominator], value


def test_the_recipes_weights_are_marked_until_a_slider_moves(opened, page_path: Path) -> None:
    page = opened(page_path)
    own = page.evaluate("pairs.map(pair => keptOf(pair).map(side => [...side]))")
    again = page.evaluate(
        "(() => { state.moved = '1'; return pairs.map(p => keptOf(p).map(s => [...s])); })()"
    )
    assert own == again, "the page applies the recipe's rule as the library does"
    page = opened(page_path)
    kept = page.locator(".sides .kept").count()
    before = page.locator("#kept").text_content(), page.locator("#curve").inner_html()
    page.locator("#chosen-rate").scroll_into_view_if_needed()
    box = page.locator("#chosen-rate").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert 0.7 < float(page.locator("#chosen-rate").input_value()) < 0.9
    assert page.locator(".sides .kept").count() > kept
    assert page.locator("#kept").text_content() != before[0]
    assert page.locator("#curve").inner_html() != before[1]
    page.click("#reset")
    assert page.locator("#kept").text_content() == before[0]


def test_the_card_shows_the_stored_values(opened, page_path: Path, finished_run: Path) -> None:
    page, reader = opened(page_path), reader_of(finished_run)
    number = page.evaluate("open.number")
    pair = next(reader.pair(place) for place, _ in reader.places() if place.number == number)
    page.locator("#chosen .token").nth(2).hover()
    card = page.locator("#card")
    names, values = (card.locator(kind).all_text_contents() for kind in ("dt", "dd"))
    shown = dict(zip(names, values, strict=True))
    record = pair.records[0]
    score = scores_of(reader.scorer, record).tolist()
    assert shown["id, position"] == f"{record.ids[2]}, 3 of {len(record.ids)}"
    for name, value in (("log_ratio", score[2]), *((key, record.values[key][2]) for key in record.values)):
        assert float(shown[name].replace("−", "-")) == pytest.approx(value, abs=1e-4), name
    assert shown["rank by log_ratio"] == f"{1 + sum(x > score[2] for x in score)} of {len(score)}"
    page.locator("#chosen .token").nth(2).click()
    page.mouse.move(2, 2)
    assert card.is_visible()
    page.keyboard.press("Escape")
    assert not card.is_visible()


def test_the_keyboard_works_and_the_address_restores_the_view(opened, page_path: Path) -> None:
    page = opened(page_path)
    first = page.locator("#about").text_content()
    page.keyboard.press("j")
    page.keyboard.press("j")
    third = page.locator("#about").text_content()
    page.keyboard.press("k")
    assert len({first, third, page.locator("#about").text_content()}) == 3
    page.locator("#rejected").focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.locator("#rejected .pinned").get_attribute("data-group") == "1"
    text = page.locator("#card").text_content()
    again = opened(page_path, page.url.partition("#")[2] and "#" + page.url.partition("#")[2])
    assert again.locator("#card").text_content() == text
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("say 7.")
    assert page.locator("#list tr").count() == 1
    assert "1 of 24" in (page.locator("#count").text_content() or "")


def test_sorting_filtering_and_switching_scorers(opened, page_path: Path) -> None:
    page = opened(page_path)

    def column(place: int) -> list[float]:
        cells = page.locator(f"#list td:nth-child({place})").all_text_contents()
        return [float(re.sub(r"[^\d.-]", "", cell.replace("−", "-"))) for cell in cells]

    for value, place, reverse in (
        ("margin down", 2, True), ("margin up", 2, False), ("disagreement down", 3, True), ("length up", 5, False),
        ("peaks down", 4, True),
    ):  # fmt: skip
        page.select_option("#sort", value)
        assert column(place) == sorted(column(place), reverse=reverse), value
    options = page.locator("#part option").evaluate_all("options => options.map(option => option.value)")
    assert options == ["all", "train", "eval", "eval_reward"], "the parts of tokenward.report.pairs"
    page.select_option("#part", "eval")
    assert 0 < page.locator("#list tr").count() < 24
    margins = page.locator("#list").text_content()
    colours = page.locator("#chosen").inner_html()
    page.select_option("#scorer", "surprisal")
    assert page.locator("#list").text_content() != margins
    assert page.locator("#chosen").inner_html() != colours
    assert page.locator("#centred").is_visible()
    assert page.evaluate("scorers") == ["log_ratio", "surprisal", "random"]


def test_the_frame_of_a_word_is_not_split_between_lines(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.set_viewport_size({"width": 700, "height": 900})
    split = """where => [...document.querySelectorAll("#sides .token")].filter((token) =>
        /^ \\S/.test(token.textContent) && token.getClientRects().length > 1).length"""
    page.evaluate(
        """() => { for (const box of document.querySelectorAll("#sides .text")) box.style.width = "5em"; }"""
    )
    assert page.evaluate(split) == 0
    assert page.evaluate("document.querySelectorAll('#sides .token.whole').length") > 3
    page.evaluate(
        """() => { for (const one of document.querySelectorAll(".whole")) one.classList.remove("whole"); }"""
    )
    assert page.evaluate(split) > 0, "the box is narrow enough to split words"


def test_known_spans_are_marked(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.fill("#q", "good")
    page.locator("#list button").first.click()
    assert page.locator("#chosen .known-up").all_text_contents() == ["good"]
    assert "".join(page.locator("#rejected .known-down").all_text_contents()) == "bad"


def test_text_of_the_data_is_never_markup(opened, odd_run: Path) -> None:
    page = opened(make_report(odd_run).save())
    assert page.locator("main script, main img, main b b").count() == 0
    seen = 0
    for number in range(page.evaluate("pairs.length")):
        page.evaluate("n => change({row: pairs[n].key})", number)
        stored = page.evaluate("open.responses[0].text")
        shown = page.evaluate(
            """[...document.querySelectorAll("#chosen .token")].filter(x => !x.classList.contains("pill")).map(x => {
                 const copy = x.cloneNode(true);
                 copy.querySelectorAll(".mark").forEach(mark => mark.remove());
                 copy.querySelectorAll(".pill").forEach(pill => pill.replaceWith(
                   String.fromCodePoint(parseInt(pill.textContent.slice(2), 16))));
                 return copy.textContent; }).join("")"""
        )
        assert shown == stored
        seen += stored in ODD
        if "👩" in stored:
            pieces = page.locator("#chosen .token").all_text_contents()
            assert any("👩‍👩‍👧‍👦" in piece for piece in pieces)
            page.locator("#chosen .token", has_text="👩‍👩‍👧‍👦").hover()
            assert "share a character" in (page.locator("#card").text_content() or "")
        if "\u202e" in stored:
            assert "U+202E" in (page.locator("#chosen").text_content() or "")
    assert seen == len(ODD)


def luminance(rgb: str) -> float:
    if rgb.startswith("color(srgb"):
        parts = [float(x) for x in rgb[len("color(srgb") :].strip(" )").split()[:3]]
    else:
        parts = [int(x) / 255 for x in re.findall(r"\d+", rgb)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrasts(page, change: str = "") -> list[float]:
    """Contrast of text on each shade of the page."""
    colours = page.evaluate(
        f"""[...document.querySelectorAll(".ramp i")].map(x => {{ {change}
             return [getComputedStyle(x).backgroundColor, getComputedStyle(x).color]; }})"""
    )
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    found = []
    for ground, ink in colours:
        behind = body if ground == "rgba(0, 0, 0, 0)" else ground
        low, high = sorted((luminance(behind), luminance(ink)))
        found.append((high + 0.05) / (low + 0.05))
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_on_every_shade(opened, page_path: Path, theme: str) -> None:
    page = opened(page_path, "#dim=1", color_scheme=theme)
    for change in ("", 'x.classList.add("shared");'):
        found = contrasts(page, change)
        assert len(found) == 21
        assert min(found) >= 4.5, (change, found)
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) < 0.1) == (theme == "dark")


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_the_first_screen_has_the_outcome_and_a_shaded_pair(
    opened, page_path: Path, size: tuple[int, int]
) -> None:
    page = opened(page_path, folded=True)
    page.set_viewport_size({"width": size[0], "height": size[1]})
    for part in ("#sentence", "#reward svg", "#next", "#chosen"):
        box = page.locator(part).bounding_box()
        assert box["y"] + box["height"] <= size[1], part
        assert box["x"] + box["width"] <= size[0], part
    assert not page.locator("#scorer").is_visible()
    assert page.evaluate("open.part") == "eval"
    against = page.evaluate(
        "pairs.filter(pair => pair.part === 'eval').map(pair => measures(pair).disagreement)"
    )
    assert page.evaluate("measures(open).disagreement") == pytest.approx(min(against))
    before = page.locator("#prompt").text_content()
    page.click("#next")
    page.click("#previous")
    assert page.locator("#prompt").text_content() == before


def test_selected_tokens_beside_each_other_share_a_frame(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.evaluate("() => { state.moved = '1'; change({chosen: '1', rejected: '1'}); }")
    framed = page.evaluate(
        """[...document.querySelectorAll("#chosen .token")].map(x => [..."kept first last".split(" ").map(c => x.classList.contains(c))])"""
    )
    assert len(framed) > 3
    assert all(kept for kept, _, _ in framed)
    assert [first for _, first, _ in framed] == [True] + [False] * (len(framed) - 1)
    assert [last for _, _, last in framed] == [False] * (len(framed) - 1) + [True]


def test_the_legend_says_what_the_frames_are(opened, page_path: Path) -> None:
    page = opened(page_path)
    assert page.locator("#framed").text_content() == "what training would select; this pair is held out"
    page.select_option("#part", "train")
    page.locator("#list button").first.click()
    assert page.locator("#framed").text_content() == "the policy trains on it"
    page.select_option("#scorer", "surprisal")
    assert page.locator("#framed").text_content() == "selected by the current settings"
    assert page.locator("#heading").text_content() == "", "surprisal favours no reply"


def test_a_pair_that_is_found_comes_into_view(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#q", "say 7.")
    page.keyboard.press("Enter")
    assert page.locator("#place").text_content() == "1 of 1"
    assert "Say 7." in (page.locator("#prompt").text_content() or "")
    assert page.locator("#prompt").bounding_box()["y"] >= 0
    page.fill("#q", "nothing has these words")
    assert page.locator("#count").text_content() == "no pair matches"
    assert page.locator("#previous").is_disabled()
    assert page.locator("#next").is_disabled()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["pairs", "online"])
def test_axe_finds_no_fault(opened, page_path: Path, finished_online: Path, theme: str, kind: str) -> None:
    path = page_path if kind == "pairs" else finished_online / "runs" / "online" / "report" / "index.html"
    page = opened(path, "#stacked=1&sums=1&table=1" if kind == "pairs" else "", color_scheme=theme)
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text())
    found = page.evaluate("axe.run()")["violations"]
    assert not [(fault["id"], [node["html"][:120] for node in fault["nodes"]][:3]) for fault in found]


def test_it_is_one_column_on_a_narrow_screen_and_prints(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate("change({dim: '1', sums: '1', stacked: '1', table: '1', lines: '1'})")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    cut = "selector => [...document.querySelectorAll(selector)].filter(x => x.scrollWidth > x.clientWidth).length"
    assert page.evaluate(cut, "#replies .scroll, #figures > .scroll") == 0, (
        "no part of a table is out of sight"
    )
    page.emulate_media(media="print")
    assert page.locator("#chosen").is_visible()
    assert not page.locator("#list").is_visible()


def test_an_online_page_opens_without_scripts(opened, finished_online: Path) -> None:
    page = opened(finished_online / "runs" / "online" / "report" / "index.html")
    assert page.locator("#figures th", has_text="rouge1/change").count() == 1
    assert page.locator("#replies table").first.locator("tbody tr").count() == 1
    assert page.locator("#replies h3", has_text="during the stage online").count() == 1
    assert page.locator("#training figure").count() >= 1
    assert page.locator("#comparisons").count() == 0


def test_the_scripts_are_small_and_the_page_links_nothing(page_path: Path) -> None:
    html = page_path.read_text()
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    assert len(script.encode()) <= 48_000
    assert json.loads(html.partition('id="data">')[2].partition("</script>")[0])["schema"] == 2
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html
