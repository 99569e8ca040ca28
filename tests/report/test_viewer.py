"""The parts of the page that compare: units, shared words, running sums, several scores, table and copies."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.report.conftest import ODD
from tokenward.report.page import make_report

READ_UNITS = """name => pairs.map(pair => pair.responses.map(response => ["token", "word", "sentence"].map(unit =>
    pooledUnits(response, channels[name], unit, "mean").map(({places, value}) => [places, value]))))"""


def scores_of_page(page, name: str) -> list[list[list[float]]]:
    return page.evaluate("name => pairs.map(p => p.responses.map(r => [...r.values[name]]))", name)


def card_of(page) -> dict[str, str]:
    names, values = (page.locator(f"#card {kind}").all_text_contents() for kind in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def number(text: str | None) -> float:
    return float((text or "").replace("−", "-"))


def test_units_are_made_of_whole_words_and_pool_the_raw_scores(opened, page_path: Path) -> None:
    page = opened(page_path)
    scores = scores_of_page(page, "log_ratio")
    texts = page.evaluate(
        "pairs.map(p => p.responses.map(r => r.groups.map(g => g.map(i => pieceOf(r, i)).join(''))))"
    )
    for pair, both in enumerate(page.evaluate(READ_UNITS, "log_ratio")):
        for side, (tokens, words, sentences) in enumerate(both):
            values = np.array(scores[pair][side])
            for units in (tokens, words, sentences):
                assert [place for places, _ in units for place in places] == list(range(len(values)))
                for places, value in units:
                    assert value == pytest.approx(values[places].mean(), abs=1e-5)
            pieces = texts[pair][side]
            shown = ["".join(pieces[place] for place in places) for places, _ in words[:-1]]
            assert [word.strip() for word in shown] == "".join(pieces).split()
            assert len(sentences) == 2  # one sentence, and the end of the turn by itself


def test_a_sum_has_its_own_scale_and_leaves_missing_scores_out(opened, page_path: Path) -> None:
    page = opened(page_path)
    assert page.evaluate("[pool([1, NaN, 4], 'sum'), pool([1, NaN, 4], 'mean')]") == [5, 2.5]
    assert page.evaluate("Number.isNaN(pool([NaN], 'mean'))")
    assert page.locator("#pool").is_disabled()
    page.select_option("#unit", "sentence")
    assert page.locator("#of-tokens").is_visible()
    of_tokens = number(page.locator("#high").text_content())
    page.select_option("#pool", "sum")
    sums = page.evaluate(
        "pairs.flatMap(p => p.responses.flatMap(r => pooledUnits(r, channels.log_ratio, 'sentence', 'sum').map(u => Math.abs(u.apart))))"
    )
    rank = int(0.98 * (len(sums) - 1))
    assert number(page.locator("#high").text_content()) == pytest.approx(sorted(sums)[rank], abs=0.006)
    assert number(page.locator("#high").text_content()) > of_tokens
    assert page.locator("#of-sums").is_visible()
    assert "the sum over the tokens of a sentence" in (page.locator("#pooled").text_content() or "")


def test_shade_card_and_keys_follow_the_unit(opened, page_path: Path) -> None:
    page = opened(page_path)
    by_token = page.locator("#chosen").inner_html()
    page.keyboard.press("u")
    assert page.locator("#unit").input_value() == "word"
    assert page.locator("#chosen").inner_html() != by_token
    spans = page.evaluate(
        "[...document.querySelectorAll('#chosen .token')].map(x => [x.dataset.unit, [...x.classList].filter(c => /^(l\\d+|up|down)$/.test(c)).join()])"
    )
    by_unit: dict[str, set[str]] = {}
    for unit, shade in spans:
        by_unit.setdefault(unit, set()).add(shade)
    assert all(len(shades) == 1 for shades in by_unit.values())
    assert len(by_unit) < len(spans)
    page.locator("#chosen").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.unit") == "2"
    assert page.locator("#chosen .same-unit").count() == sum(unit == "2" for unit, _ in spans)
    card = card_of(page)
    places, value = page.evaluate(READ_UNITS, "log_ratio")[page.evaluate("pairs.indexOf(open)")][0][1][2]
    assert number(card["log_ratio"]) == pytest.approx(value, abs=1e-4)
    assert card["tokens"].startswith(f"{len(places)}, ")
    assert card["scores are"] == "the mean over the tokens of a word"
    page.keyboard.press("End")
    assert "id, position" in page.locator("#card dt").all_text_contents()  # eos is not part of a word
    page.keyboard.press("Escape")
    page.keyboard.press("u")
    page.keyboard.press("u")
    assert page.locator("#chosen").inner_html() == by_token


def test_shared_words_dim_and_show_both_scores(opened, page_path: Path) -> None:
    page = opened(page_path)
    number_of = page.evaluate("pairs.findIndex(p => p.responses[0].twins.size > 0)")
    assert number_of >= 0
    page.evaluate("n => change({row: pairs[n].key})", number_of)

    def words(side: int) -> list[str]:
        return page.evaluate(
            """side => { const r = open.responses[side];
                 return [...r.twins.keys()].map(w => wordPlaces(r, w).map(i => pieceOf(r, i)).join("").trim()); }""",
            side,
        )

    assert words(0) == words(1) != []
    ink = "getComputedStyle(document.querySelector('#chosen .shared')).color"
    plain = page.evaluate(ink)
    page.keyboard.press("d")
    assert page.evaluate(ink) != plain
    span = page.locator("#chosen .shared").first
    span.hover()
    twins = page.locator("#rejected .twin").all_text_contents()
    assert "".join(twins).strip() == words(0)[0]
    card = card_of(page)
    here, there = page.evaluate(
        """[0, 1].map(side => { const r = open.responses[side], word = [...r.twins.keys()][0];
             return shown(pool(wordPlaces(r, word).map(i => r.values.log_ratio[i]), "mean")); })"""
    )
    assert card["shared word"] == f"{here} here, {there} in the rejected response"
    page.mouse.move(2, 2)
    assert page.locator(".twin").count() == 0


def test_running_sums_end_at_the_sums_and_lead_to_their_tokens(opened, page_path: Path) -> None:
    page = opened(page_path)
    assert not page.locator("#chosen-sums").is_visible()
    page.keyboard.press("s")
    values = np.array(page.evaluate("[...open.responses[0].values.log_ratio]"))
    sums = values.cumsum()
    card = page.locator("#chosen-sum").text_content() or ""
    assert f"highest {sums.max():+.2f} after token {sums.argmax() + 1}".replace("-", "−") in card
    head = page.locator("#chosen-head").text_content() or ""
    assert f"ends at {head.split()[3].rstrip(',')};" in card
    points = page.locator("#chosen-line .mine").get_attribute("points") or ""
    assert len(points.split()) == len(values) + 1
    line = page.locator("#chosen-line")
    line.scroll_into_view_if_needed()
    box = line.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 3.5 / len(values), box["y"] + box["height"] / 2)
    pinned = page.locator("#chosen .pinned")
    group = page.evaluate("open.responses[0].groups.findIndex(g => g.includes(3))")
    assert pinned.get_attribute("data-group") == str(group)
    card = card_of(page)
    place = page.evaluate("n => open.responses[0].groups[n][0]", group)
    assert number(card["running sum"]) == pytest.approx(sums[place], abs=0.006)


def in_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < x).sum() + ((values == x).sum() - 1) / 2 for x in values])


def test_all_scores_are_shown_with_their_correlations(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.keyboard.press("c")
    heads = page.locator("#chosen-stack h4").all_text_contents()
    assert [head.partition(":")[0] for head in heads] == ["surprisal", "random"]
    texts = page.locator("#chosen-stack .text")
    marked = page.evaluate("pairs.findIndex(p => p.responses[0].values.known.some(x => x > 0))")
    page.evaluate("n => change({row: pairs[n].key})", marked)
    for place in range(2):  # the spans are outlined against every score
        assert (
            texts.nth(place).locator(".known-up").all_text_contents()
            == page.locator("#chosen .known-up").all_text_contents()
        )
    assert texts.nth(0).inner_html() != page.locator("#chosen").inner_html()
    rows = {
        row.locator("th").text_content(): row.locator("td").all_text_contents()
        for row in page.locator("#agreements tr").all()
    }
    assert set(rows) == {"log_ratio, surprisal", "log_ratio, random", "surprisal, random"}
    columns = {name: scores_of_page(page, name) for name in ("log_ratio", "surprisal")}
    here = [np.concatenate([np.array(side) for side in column[marked]]) for column in columns.values()]
    page_wide = [
        np.concatenate([np.array(s) for pair in column for s in pair]) for column in columns.values()
    ]
    expected = []
    for one, other in (here, page_wide):
        expected += [
            np.corrcoef(one, other)[0, 1],
            np.corrcoef(in_ranks(one), in_ranks(other))[0, 1],
            len(one),
        ]
    assert [number(cell) for cell in rows["log_ratio, surprisal"]] == pytest.approx(expected, abs=0.0051)
    texts.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#chosen-stack .pinned").count() == 1


def test_the_table_shows_the_scores_in_numbers(opened, page_path: Path) -> None:
    page = opened(page_path)
    assert not page.locator("#table-rows").is_visible()
    page.locator("#table summary").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#table-rows tr")
    groups = page.evaluate("open.responses.map(r => r.groups.length)")
    assert page.locator("#table-rows tr").count() == sum(groups)
    names = page.locator("#table-head th").all_text_contents()
    assert names == ["response", "no.", "token", "log_ratio", "surprisal", "random", "selected", "known"]
    cells = page.locator("#table-rows tr").first.locator("td").all_text_contents()
    first = page.evaluate(
        "pool(open.responses[0].groups[0].map(i => open.responses[0].values.log_ratio[i]), 'mean')"
    )
    assert number(cells[2]) == pytest.approx(first, abs=1e-3)
    assert (
        page.locator("#table-rows tr td:nth-child(7)", has_text="yes").count()
        == page.locator("#sides > div > .text .kept").count()
    )
    page.select_option("#unit", "sentence")
    assert page.locator("#table-rows tr").count() == 4
    again = opened(page_path, "#" + page.url.partition("#")[2])
    assert again.locator("#table-rows tr").count() == 4


def test_tsv_holds_every_raw_number(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.click("#tsv")
    page.wait_for_function("document.getElementById('copy-status').textContent")
    lines = [line.split("\t") for line in page.locator("#copied").input_value().rstrip("\n").split("\n")]
    head, rows = lines[0], lines[1:]
    assert head[:4] == ["response", "position", "id", "token"]
    ids = page.evaluate("open.responses.map(r => [...r.ids])")
    assert [int(row[2]) for row in rows] == ids[0] + ids[1]
    for name in ("log_ratio", "surprisal", "reference_logp", "oracle_logp", "known"):
        stored = page.evaluate("name => open.responses.flatMap(r => [...r.values[name]])", name)
        assert [float(row[head.index(name)]) for row in rows] == pytest.approx(stored, rel=1e-6), name
    assert (
        page.evaluate("document.activeElement.id") == "copied"
    )  # selected, to be copied by hand where it must be


def test_odd_text_survives_tsv_and_latex(opened, page_path: Path) -> None:
    page = opened(page_path)
    latex = page.evaluate("x => latexToken(x, 0.5, true)", " 50%_of {a\\b} & ~^#$ ")
    assert latex == (
        " \\tokenscore{159,199,235}{\\underline{50\\%\\_of \\{a\\textbackslash{}b\\} \\& \\textasciitilde{}\\textasciicircum{}\\#\\$}} "
    )
    assert page.evaluate("latexToken('\\n', 0, true)") == (
        "\\tokenscore{255,255,255}{\\underline{$\\hookleftarrow$}}\\par\n"
    )
    assert page.evaluate("latexToken(' ', -1, false)") == "\\tokenscore{240,138,36}{~}\\allowbreak "
    assert page.evaluate("latexToken('x', NaN, false)") == "\\tokenscore{255,255,255}{x}"
    page.evaluate("pieceOf = () => 'a\\tb\\nc\\\\'")
    rows = page.evaluate("asTsv()").rstrip("\n").split("\n")
    assert {len(row.split("\t")) for row in rows} == {len(rows[0].split("\t"))}
    assert rows[1].split("\t")[3] == "a\\tb\\nc\\\\"


def test_latex_has_the_shades_and_the_selection_of_the_page(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.click("#latex")
    page.wait_for_function("document.getElementById('copy-status').textContent")
    text = page.locator("#copied").input_value()
    assert text.startswith("% \\usepackage{xcolor}\n% log_ratio")
    assert text.count("\\underline") == page.locator("#sides > div > .text .kept").count()
    assert text.count("\\tokenscore{") == page.locator("#sides > div > .text .token").count()
    assert text.count("{") == text.count("}")


def test_long_texts_are_laid_out_when_they_come_near(opened, page_path: Path, tmp_path: Path) -> None:
    """A pair of 2 x 8,000 tokens, made of the page's own: its blocks stay in the document, where a search finds them."""
    html = page_path.read_text()
    begin, end = html.index('id="data">') + len('id="data">'), html.index("</script>")
    data = json.loads(html[begin:end])
    data["comparisons"] = [lengthened(data["comparisons"][0], 8000)]
    long = tmp_path / "long.html"
    long.write_text(html[:begin] + json.dumps(data).replace("<", "\\u003c") + html[end:])
    page = opened(long)
    assert page.locator("#chosen .token").count() == 8000
    blocks = page.locator("#chosen .paragraph")
    assert blocks.count() > 200
    assert page.evaluate("getComputedStyle(document.querySelector('.paragraph')).contentVisibility") == "auto"
    assert page.evaluate("window.find('the-very-last')")
    page.emulate_media(media="print")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.paragraph')).contentVisibility") == "visible"
    )


def lengthened(pair: dict, tokens: int) -> dict:
    """A pair whose responses are lines of one letter a token, closed by a last word."""
    from base64 import b64encode

    def packed(values: np.ndarray, kind: str) -> str:
        return b64encode(values.astype(kind).tobytes()).decode()

    text = ("a" * 31 + "\n") * (tokens // 32)
    text = text[: tokens - 1] + " the-very-last"
    ends = np.arange(1, tokens + 1)
    ends[-1] = len(text)
    names = pair["responses"][0]["values"]
    scores = np.random.default_rng(0).normal(size=tokens)
    response = {
        "text": text, "eos": 0, "ids": packed(np.ones(tokens), "<i4"), "ends": packed(ends, "<i4"),
        "breaks": packed((np.arange(tokens) % 32 == 0) * 3, "<u1"),
        "values": {name: packed(scores, "<f4") for name in names},
    }  # fmt: skip
    return pair | {"responses": [response, response], "shared": [[0, 0, 3]]}


def test_the_whole_list_can_be_read_at_1200_pixels(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.set_viewport_size({"width": 1200, "height": 820})
    page.evaluate("pairs.forEach(p => { p.prompt[0].content = 'a long prompt '.repeat(20); }); show()")
    assert page.locator("#list td").first.bounding_box()["width"] > 80
    assert page.evaluate("(x => x.scrollWidth <= x.clientWidth)(document.querySelector('#find .scroll'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_the_controls_survive_a_wrong_address_and_come_back_from_a_right_one(opened, page_path: Path) -> None:
    page = opened(page_path, "#unit=paragraph&pool=max&scale=none&show=spans&sort=&dim=1&sums=1&stacked=1")
    assert page.locator("#show").input_value() == "all"
    assert page.locator("#list tr").count() == 24
    assert page.locator("#unit").input_value() == "token"
    assert page.locator("#pool").input_value() == "mean"
    for name in ("dim", "sums", "stacked"):
        assert page.locator(f"#{name}").is_checked()
    assert page.locator("#rejected-line").is_visible()
    assert page.locator("#agreement").is_visible()


def test_odd_text_is_whole_in_every_unit_and_copy(opened, odd_run: Path) -> None:
    page = opened(make_report(odd_run).save(), "#unit=word&dim=1&stacked=1&table=1&sums=1")
    shown = """() => [...document.querySelectorAll("#chosen .token")].map(span => {
        const group = open.responses[0].groups[span.dataset.group];
        return isClosing(open.responses[0], group[0]) ? "" : group.map(i => pieceOf(open.responses[0], i)).join("");
      }).join("")"""
    seen = set()
    for place in range(page.evaluate("pairs.length")):
        page.evaluate("n => change({row: pairs[n].key})", place)
        seen.add(page.evaluate(shown))
        page.locator("#chosen .token").first.hover()
        rows = page.evaluate("asTsv()").rstrip("\n").split("\n")
        assert {row.count("\t") for row in rows} == {rows[0].count("\t")}
        assert page.locator("main script, main img").count() == 0
    assert set(ODD) <= seen


def test_paper_gets_the_whole_table_and_no_controls(opened, page_path: Path) -> None:
    page = opened(page_path)
    page.keyboard.press("t")
    page.click("#tsv")
    page.set_viewport_size({"width": 1200, "height": 400})
    page.emulate_media(media="print")
    assert page.evaluate(
        "(x => x.scrollHeight <= x.clientHeight + 1)(document.querySelector('#table .scroll'))"
    )
    assert page.locator("#table-rows").is_visible()
    assert not page.locator("#copied").is_visible()
    assert not page.locator("#tsv").is_visible()
    page.emulate_media(media="screen")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    assert not page.locator("#table-rows").is_visible()
    page.emulate_media(media="print")
    assert not page.locator("#table summary").is_visible()  # paper has no buttons


def test_correlations_shares_and_digits(opened, page_path: Path) -> None:
    page = opened(page_path)
    assert page.evaluate("ranks([5, 1, 5, 7])") == [1.5, 0, 1.5, 3]
    assert page.evaluate("pearson([1, 2, 3], [2, 4, 6])") == pytest.approx(1)
    assert page.evaluate("Number.isNaN(pearson([1, 1], [1, 2]))")
    measures = page.evaluate("pairs.map(measures)")
    for pair, found in zip(scores_of_page(page, "log_ratio"), measures, strict=True):
        sizes = np.sort(np.abs(np.concatenate(pair)))[::-1]
        assert found["peaks"] == pytest.approx(sizes[: -(-len(sizes) // 10)].sum() / sizes.sum(), rel=1e-5)
    whole = page.evaluate("correlation([open], 'log_ratio', 'random').n")
    page.evaluate("open.responses[0].values.random[2] = NaN")
    found = page.evaluate("correlation([open], 'log_ratio', 'random')")
    assert found["n"] == whole - 1, "missing scores are left out"
    assert -1 <= found["pearson"] <= 1
    page.evaluate("channels.log_ratio.limit = 0.00052; show()")
    digits = page.evaluate("[shown(0.00031), shown(-0.00002), shown(0.5, 2, ''), shown(0.00031, 3)]")
    assert digits == ["+0.00031", "−0.00002", "+0.50", "+0.000310"]
    assert number(page.locator("#high").text_content()) == pytest.approx(0.00052, abs=1e-6)
    assert number(page.locator("#low").text_content()) == pytest.approx(-0.00052, abs=1e-6)
    page.evaluate("channels.log_ratio.limit = 3; show()")
    assert page.evaluate("shown(0.00031)") == "0.00"
