"""A comparison of two runs on screen: tables, and the rows that changed sides as tokens."""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from tokenward.artifacts import read_jsonl, read_manifest
from tokenward.data.lines import read_comparisons
from tokenward.display import Display
from tokenward.evaluation.row_values import PAIR
from tokenward.plugins import build
from tokenward.scoring.join import scores_of
from tokenward.scoring.scorers import SCORERS, Scorer, seeded
from tokenward.scoring.store import TokenRecord, TokenStore
from tokenward.tokens.rows import keys_of
from tokenward.tools.compare import Flip, RunComparison

RAISES, LOWERS = "blue", "dark_orange"
FAINT = 0.1
"""A score under this share of the largest one beside it gets no colour."""


def show_comparison(display: Display, found: RunComparison, rows: int) -> None:
    """Show what differs: recipe values, figures, and so many rows that changed sides.

    Args:
        display: The screen.
        found: The comparison.
        rows: Of each kind of row.
    """
    display.line(f"A  {found.folders[0]}\nB  {found.folders[1]}")
    changed = [(change,) for change in found.settings] or [("nothing",)]
    display.table("recipe values that differ, A -> B", ("",), changed)
    lines = [
        (
            item.name,
            f"{item.first:.3f}",
            f"{item.second:.3f}",
            f"{item.difference.value:+.3f}",
            f"{item.difference.low:+.3f} .. {item.difference.high:+.3f}",
            f"{item.higher}/{item.lower}/{item.equal}",
        )
        for item in found.figures
    ]
    columns = ("", "A", "B", "B - A", "95 %", "B >/</= A")
    display.table("the same rows in both runs", columns, lines)
    _show_flips(display, found, rows)


def _show_flips(display: Display, found: RunComparison, rows: int) -> None:
    sides = [RunView(folder) for folder in found.folders]
    for figure in dict.fromkeys(flip.figure for flip in found.flips):
        flips = [flip for flip in found.flips if flip.figure == figure]
        display.line(f"\n{len(flips)} rows on which {figure} has another sign in A and B")
        for flip in flips[:rows]:
            display.line(f"\n  A {flip.first:+.3f}  B {flip.second:+.3f}")
            show = _show_pair if flip.row.kind == PAIR else _show_replies
            show(display, sides, flip)


class EvalResponse(NamedTuple):
    """A held-out response."""

    prompt: str
    text: str


class RunView:
    """What a run's folder holds of its held-out rows.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def replies(self) -> dict[str, dict[str, Any]]:
        """Lines of the evaluation's samples, by key."""
        return {line["key"]: line for line in read_jsonl(self._folder / "evaluation" / "samples.jsonl")}

    @cached_property
    def responses(self) -> dict[str, EvalResponse]:
        """Held-out responses, by key."""
        return {
            key: EvalResponse(row.prompt[-1]["content"], text)
            for row in read_comparisons(self._folder / "data" / "eval.jsonl")
            for key, text in zip(keys_of(row), row.responses, strict=True)
        }

    @cached_property
    def scorer(self) -> Scorer:
        """The run's scorer."""
        settings = read_manifest(self._folder / "policy").settings
        table = seeded(settings["scores"]["scorer"], settings["seed"])
        return build("scorer", table.pop("name"), table, SCORERS)

    @cached_property
    def store(self) -> TokenStore:
        """The run's score store."""
        return TokenStore(self._folder / "scores")

    def scored(self, key: str) -> Text:
        """A response's tokens, coloured by the score that this run gave them."""
        record = self.store[key]
        return coloured(
            token_texts(record, record.text or self.responses[key].text),
            scores_of(self.scorer, record).tolist(),
        )


def token_texts(record: TokenRecord, text: str) -> list[str]:
    """The text of each stored token; empty for one that is no text."""
    raw = text.encode()
    return [
        raw[start:end].decode(errors="replace") for start, end in zip(record.start, record.end, strict=True)
    ]


def coloured(texts: Sequence[str], scores: Sequence[float]) -> Text:
    """Tokens in a line: blue and underlined where the score raises the response, orange where it lowers it."""
    least = FAINT * max(map(abs, scores), default=0.0)
    line = Text()
    for text, score in zip(texts, scores, strict=True):
        style = "" if abs(score) <= least else f"{RAISES} underline" if score > 0 else LOWERS
        line.append(text, style=style)
    return line


def _show_pair(display: Display, sides: Sequence[RunView], flip: Flip) -> None:
    keys = flip.row.key.split("-")
    display.line(f"  prompt: {_short(sides[0].responses[keys[0]].prompt)}")
    for name, key in zip(("chosen", "rejected"), keys, strict=True):
        views = [side.scored(key) for side in sides]
        same = views[0] == views[1] and views[0].spans == views[1].spans
        for label, view in zip(("A, B",) if same else ("A", "B"), views, strict=False):
            display.text(Text.assemble((f"  {name}, scores of {label}: ", "bold"), view))


def _show_replies(display: Display, sides: Sequence[RunView], flip: Flip) -> None:
    lines = [side.replies[flip.row.key] for side in sides]
    display.line(f"  prompt: {_short(_prompt_of(lines[0]))}")
    texts = [str(line["after"]) for line in lines]
    for label, other, mine in (("A", texts[1], texts[0]), ("B", texts[0], texts[1])):
        display.text(Text.assemble((f"  {label}: ", "bold"), different_words(other, mine)))


def _prompt_of(line: Mapping[str, Any]) -> str:
    # An online run's line names its example by key alone.
    return str(line["prompt"][-1]["content"]) if "prompt" in line else str(line["key"])


def different_words(other: str, mine: str) -> Text:
    """``mine`` with the words that ``other`` does not have in that place in bold, the rest dim."""
    theirs, words = (re.findall(r"\S+\s*", text) for text in (other, mine))
    line = Text()
    for kind, _, _, first, last in difflib.SequenceMatcher(None, theirs, words, autojunk=False).get_opcodes():
        line.append("".join(words[first:last]), style="dim" if kind == "equal" else "bold")
    return line


def _short(text: str, longest: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
