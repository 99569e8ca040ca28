"""Draw the method in one picture, from a pair and an oracle of a finished run.

    python scripts/overview_picture.py runs/quickstart --prompt "What would a critical customer say about a backpack"

Writes docs/pictures/overview.svg: a comparison, its token rewards as shades, the selected tokens, the objective, and the
figures of docs/results.md for the trained models. ``--list`` prints eval pairs that are short enough.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as xml

import torch

import tokenward
from tokenward.artifacts import read_jsonl
from tokenward.scoring.texts import ScoredToken
from tokenward.selection import ScoredTokens, SideRule, TopFraction

ROOT = Path(__file__).parent.parent
WIDTH, LEFT, RIGHT = 980, 216, 964
SIZE, LINE = 13.0, 24.0
ADVANCE = SIZE * 0.602
"""Width of a letter. Each word is scaled to it, whatever the fixed-width font."""
LONGEST = 2 * int((RIGHT - LEFT) / ADVANCE)
FIXED, PLAIN = (
    "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace",
    "system-ui, 'DejaVu Sans', sans-serif",
)
INK, GREY, LEFT_OUT, FAINT, RAISES, LOWERS = "#1a1a1a", "#5a5f66", "#8b929a", "#c9ced4", "#2f7fc1", "#e08214"


class Pair(NamedTuple):
    """A prompt, the better reply and the worse one."""

    prompt: str
    replies: tuple[str, str]


class Token(NamedTuple):
    """A token as it is drawn."""

    text: str
    score: float
    selected: bool


def eval_pairs(run: Path) -> Iterator[Pair]:
    """Best and worst reply to each eval prompt, if both fit into two lines."""
    for row in read_jsonl(run / "data" / "eval.jsonl"):
        order = sorted(range(len(row["ranks"])), key=row["ranks"].__getitem__)
        best, worst = (row["responses"][order[place]] for place in (0, -1))
        if max(len(best), len(worst)) <= LONGEST and "\n" not in best + worst:
            yield Pair(row["prompt"][-1]["content"], (best, worst))


def selected(sides: Sequence[Sequence[ScoredToken]]) -> list[bool]:
    """The quick start's selection: the highest 30 % of the better reply, the lowest 30 % of the other, no EOS."""
    tokens = [token for side in sides for token in side]
    scored = ScoredTokens(
        scores=torch.tensor([token.score for token in tokens]),
        response=torch.tensor([0] * len(sides[0]) + [1] * len(sides[1])),
        comparison=torch.tensor([0, 0]),
        rank=torch.tensor([0, 1]),
        eos=torch.tensor([token.start == token.end for token in tokens]),
        seeds=torch.tensor([0, 0]),
    )
    rule = TopFraction(
        chosen=SideRule(fraction=0.3), rejected=SideRule(fraction=0.3, direction="bottom"), eos="none"
    )
    return [weight > 0 for weight in rule(scored).tolist()]


def scored(run: Path, pair: Pair) -> list[list[Token]]:
    """The tokens of both replies, without eos."""
    scorer = tokenward.TokenScorer.load(run / "oracle")
    sides = [scorer(pair.prompt, reply).tokens for reply in pair.replies]
    chosen = iter(selected(sides))
    drawn = [[Token(token.text, token.score, next(chosen)) for token in side] for side in sides]
    return [[token for token in side if token.text] for side in drawn]


class Picture:
    """An SVG that grows downwards."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.y = 14.0
        self.root = xml.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
        self.card = xml.SubElement(self.root, "rect", fill="#ffffff", stroke=FAINT, rx="10")

    def text(self, x: float, y: float, text: str, **style: str) -> None:
        """One line of text."""
        look = {"font-family": PLAIN, "font-size": f"{SIZE:g}", "fill": INK, **style}
        xml.SubElement(self.root, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", **look}).text = text

    def row(self, number: int, name: str, part: str) -> None:
        """Begin a row with its number, its name, and the part of the library."""
        if number > 1:
            line = {"x1": "20", "x2": str(WIDTH - 20), "y1": f"{self.y:.1f}", "y2": f"{self.y:.1f}"}
            xml.SubElement(self.root, "line", {**line, "stroke": FAINT})
        self.y += 30
        xml.SubElement(self.root, "circle", cx="36", cy=f"{self.y - 5:.1f}", r="12", fill=INK)
        self.text(36, self.y, str(number), fill="#ffffff", **{"text-anchor": "middle", "font-weight": "bold"})
        self.text(58, self.y, name, **{"font-weight": "bold", "font-size": "15"})
        self.text(58, self.y + 18, part, fill=GREY, **{"font-size": "12"})

    def words(self, tokens: Sequence[Token], kind: str) -> None:
        """Draw a reply. ``kind`` is what to show of its tokens: ``text``, ``score`` or ``weight``."""
        x = float(LEFT)
        for token in tokens:
            width = len(token.text) * ADVANCE
            if x + width > RIGHT:
                x, self.y = float(LEFT), self.y + LINE
            self._token(x, width, token, kind)
            x += width
        self.y += LINE + 4

    def _token(self, x: float, width: float, token: Token, kind: str) -> None:
        word = token.text.strip()
        space = (len(token.text) - len(token.text.lstrip())) * ADVANCE
        # Most tokens begin with a space; mark only the word.
        box = {"x": f"{x + space - 1:.1f}", "y": f"{self.y - 15:.1f}", "width": f"{width - space + 2:.1f}"}
        colour = RAISES if token.score > 0 else LOWERS
        if kind == "score":
            strength = min(1.0, abs(token.score) / self.limit)
            shade = {"height": "20", "rx": "3", "fill": colour, "fill-opacity": f"{0.75 * strength:.2f}"}
            xml.SubElement(self.root, "rect", {**box, **shade})
        chosen = kind == "weight" and token.selected
        if chosen:
            frame = {"height": "20", "rx": "3", "fill": "none", "stroke": colour, "stroke-width": "2"}
            xml.SubElement(self.root, "rect", {**box, **frame})
        style = {"font-family": FIXED, "fill": LEFT_OUT if kind == "weight" and not chosen else INK}
        length = {"textLength": f"{len(word) * ADVANCE:.1f}", "lengthAdjust": "spacingAndGlyphs"}
        if word:
            self.text(x + space, self.y, word, **style, **length)

    def legend(self) -> None:
        """Draw the legend of the shades."""
        gradient = xml.SubElement(xml.SubElement(self.root, "defs"), "linearGradient", id="scale")
        for offset, colour, opacity in (
            ("0", LOWERS, "0.75"),
            ("0.5", "#ffffff", "0"),
            ("1", RAISES, "0.75"),
        ):
            stop = {"offset": offset, "stop-color": colour, "stop-opacity": opacity}
            xml.SubElement(gradient, "stop", stop)
        bar = {"x": str(LEFT + 120), "y": f"{self.y - 11:.1f}", "width": "160", "height": "12", "rx": "3"}
        xml.SubElement(self.root, "rect", {**bar, "fill": "url(#scale)", "stroke": FAINT})
        small = {"font-size": "12", "fill": GREY}
        self.text(LEFT, self.y, f"lowers: −{self.limit:.1f} nats", **small)
        self.text(LEFT + 290, self.y, f"+{self.limit:.1f} nats: raises the preference", **small)
        self.y += LINE

    def finished(self, title: str) -> str:
        """The picture as text."""
        height = self.y + 4
        self.root.set("viewBox", f"0 0 {WIDTH} {height:.0f}")
        self.root.set("width", str(WIDTH))
        self.root.set("height", f"{height:.0f}")
        for name, value in (("x", 1), ("y", 1), ("width", WIDTH - 2), ("height", round(height - 2))):
            self.card.set(name, str(value))
        xml.SubElement(self.root, "title").text = title
        xml.indent(self.root)
        return xml.tostring(self.root, encoding="unicode") + "\n"


def draw(pair: Pair, sides: list[list[Token]], results: Mapping[str, str]) -> str:
    """The picture as SVG."""
    picture = Picture(max(abs(token.score) for side in sides for token in side))
    small = {"font-size": "12", "fill": GREY}

    def replies(kind: str) -> None:
        for name, side in zip(("preferred", "other"), sides, strict=True):
            picture.text(LEFT, picture.y - 1, name, **small)
            picture.y += 20
            picture.words(side, kind)

    picture.row(1, "comparison", "people, a metric, a model")
    picture.text(LEFT, picture.y, f"“{pair.prompt}”", **{"font-style": "italic"})
    picture.y += LINE
    replies("text")
    picture.row(2, "token reward", "scorer: a DPO oracle, …")
    replies("score")
    picture.legend()
    picture.row(3, "weight per token", "selector: top 30 %, all, …")
    replies("weight")
    picture.row(4, "objective", "SePO, DPO, likelihood, …")
    formula = "−log σ( γ · ( mean log π(selected, preferred) − mean log π(selected, other) ) )"
    picture.text(LEFT, picture.y, formula, **{"font-family": FIXED})
    picture.y += LINE + 8
    picture.row(5, "better model", "of the quick start")
    for name, found in results.items():
        picture.text(LEFT, picture.y, f"{name}: {found}", **{"font-family": FIXED})
        picture.y += LINE
    picture.y += 8
    return picture.finished("comparisons, token reward, weight per token, objective, better model")


def result(policy: str) -> str:
    """What a policy of the quick start got, from its row in a table of docs/results.md."""
    page = (ROOT / "docs" / "results.md").read_text()
    found = re.search(rf"^\| {re.escape(policy)}[^|]*\| ([.\d]+) [^|]*\| ([.\d]+) ", page, re.MULTILINE)
    assert found is not None, policy
    return f"VADER of the replies +{found[1]}, {found[2]} nats from the start"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture, or list the pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with a trained oracle")
    parser.add_argument("--prompt", default="", help="beginning of the prompt; the first match is drawn")
    parser.add_argument("--list", action="store_true", help="print the pairs instead of drawing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "overview.svg")
    options = parser.parse_args(arguments)
    pairs = [pair for pair in eval_pairs(options.run) if pair.prompt.startswith(options.prompt)]
    if not pairs:
        parser.error(f"no eval prompt of {options.run} begins with {options.prompt!r} and has short replies")
    if options.list:
        for pair in pairs:
            print(pair.prompt, *pair.replies, sep="\n  ")
        return
    results = {
        "on all tokens (DPO)": result("DPO, beta 0.3, all tokens (the quick start)"),
        "on the selected ones (SePO)": result("SePO, selected 30 %"),
    }
    picture = draw(pairs[0], scored(options.run, pairs[0]), results)
    options.output.write_text(picture)


if __name__ == "__main__":
    main()
