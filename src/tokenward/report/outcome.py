"""What a run did, for the top of its page: one sentence, and one picture of the reward before and after training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from markupsafe import Markup

from tokenward.artifacts import content_of, read_json
from tokenward.evaluation.measures import PROMPT, ROWS, read_row_values
from tokenward.evaluation.statistics import Figure, Figures
from tokenward.evaluation.tables import reward_name
from tokenward.models.default import HUB_NAME
from tokenward.objectives import OBJECTIVES
from tokenward.report.charts import plain, ticks
from tokenward.report.collect import RunFolder

ENDS = {"vader": ", from −1 (negative) to 1 (positive)"}
METRIC_NAMES = {
    "vader": "VADER sentiment",
    "eval_reward": "eval reward",
    "distinct_2": "share of distinct word pairs",
}


def metric_name(name: str | None) -> str:
    """A metric in words; a custom one by its name without the module."""
    return METRIC_NAMES.get(name, name.rpartition(":")[2]) if name else ""


class Outcome(NamedTuple):
    """The top of a page.

    Attributes:
        subject: Method, model and data, such as "SePO on SmolLM2-135M-Instruct, built-in reviews".
        sentence: What changed.
        detail: Its interval and number of examples; empty if nothing was measured.
        picture: The reward of the replies before and after training; empty if it was not measured.
    """

    subject: str
    sentence: str
    detail: str
    picture: Markup


def outcome(run: RunFolder, agreement: Figure | None) -> Outcome:
    """What a run did, from its evaluation; before that, from its scores.

    Args:
        run: The run.
        agreement: Share of pairs in which the scores agree with the order; None without scored pairs.
    """
    figures = run.figures()
    reward = reward_name(figures)
    sentence, detail, picture = "This run has not been evaluated yet.", "", Markup()
    if reward is not None and not math.isnan(figures[f"{reward}/change"].value):
        sentence, detail = _of_change(reward, figures)
        picture = reward_picture(reward, figures, *_by_prompt(run, reward))
    elif (accuracy := figures.get("preference/accuracy")) is not None:
        sentence = f"After training, the model prefers the better response in {accuracy.value:.0%} of the eval pairs."
        detail = f"{_interval(accuracy)}, over {_count(accuracy.n, 'eval pair')}. Chance is 0.5."
    elif figures:
        sentence = "The figures of the evaluation are below."
    elif agreement is not None:
        sentence = f"The scores agree with the preference in {agreement.value:.0%} of the pairs."
        detail = f"{_interval(agreement)}, over {_count(agreement.n, 'pair')}. The policy has not been evaluated yet."
    if (distance := figures.get("kl/per_reply")) is not None:
        detail += f" Distance from the start: {distance.value:.2g} nats a reply."
    return Outcome(_subject(run), sentence, detail, picture)


def _of_change(reward: str, figures: Figures) -> tuple[str, str]:
    before, after, change = (figures[f"{reward}/{part}"] for part in ("before", "after", "change"))
    name = metric_name(reward)
    sides = f"{_decimals(before.value)} before, {_decimals(after.value)} after"
    if change.low > 0:
        sentence = f"Training raised the {name} of the model's replies from {_decimals(before.value)} to {_decimals(after.value)}."
    elif change.high < 0:
        sentence = f"Training lowered the {name} of the model's replies from {_decimals(before.value)} to {_decimals(after.value)}."
    else:
        sentence = f"Training did not measurably change the {name} of the model's replies: {sides}."
    detail = (
        f"Change {_decimals(change.value, '+')}, {_interval(change)}, over {_count(change.n, 'eval prompt')}."
    )
    if "ended/change" in figures:
        ends = (figures[f"ended/{part}"].value for part in ("before", "after"))
        detail += " Replies that end: {:.0%} before, {:.0%} after.".format(*ends)
    return sentence, detail


def _decimals(value: float, sign: str = "-") -> str:
    return f"{value:{sign}.3f}".replace("-", "−")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _interval(figure: Figure) -> str:
    if figure.low == figure.high:  # resamples of equal values are equal, however few they are
        return "no interval: all are equal"
    return f"95 % interval {_decimals(figure.low)} to {_decimals(figure.high)}"


def _subject(run: RunFolder) -> str:
    path = run.path / "evaluation" / "recipe.json"
    recipe: dict[str, Any] = (
        content_of(path, read_json) if "evaluation" in run.manifests and path.is_file() else {}
    )
    facts = run.manifests["scores"].facts if "scores" in run.manifests else {}
    model = recipe.get("model", {}).get("name") or facts.get("reference")
    objective = run.setting("policy", "policy", "objective", "name") or run.setting(
        "online", "online", "objective", "name"
    )
    source = run.setting("data", "data", "source") or run.setting("examples", "examples", "source")
    parts = [
        _method(objective),
        _short(model, "default", HUB_NAME),
        _short(source, "builtin", "built-in reviews"),
    ]
    if reward := run.setting("online", "online", "source", "name"):
        parts.append(f"reward: {metric_name(reward)}")
    return " · ".join(part for part in parts if part)


def _method(name: str | None) -> str:
    """The name of an objective as its paper writes it. Custom code is named, never imported."""
    if not name:
        return ""
    return getattr(OBJECTIVES.get(name), "__name__", name.rpartition(":")[2])


def _short(name: Any, usual: str, words: str) -> str:
    """The last part of a path or a hub name: the folders above it are private."""
    if isinstance(name, list):
        return ", ".join(_short(item, usual, words) for item in name[:2]) + (
            " and others" if name[2:] else ""
        )
    return PurePath(words if name == usual else str(name)).name if name else ""


class Side(NamedTuple):
    """A reply, and its reward as text; empty if it was not stored."""

    text: str
    value: str


class ReplyRow(NamedTuple):
    """The replies to one eval prompt. An online run has references, unless its data has none."""

    prompt: str
    references: str
    before: Side
    after: Side


def reply_rows(run: RunFolder) -> list[ReplyRow]:
    """The evaluation's replies before and after training, with their reward."""
    reward, values = reward_name(run.figures()), {}
    if run.replies() and (run.path / "evaluation" / ROWS).is_file():
        found = read_row_values(run.path / "evaluation")
        values = {key.key: row for key, row in found.items() if key.kind == PROMPT}

    def side(reply: Mapping[str, Any], when: str) -> Side:
        value = values.get(reply.get("key", ""), {}).get(f"{reward}/{when}")
        return Side(reply[when], "" if value is None else f"{value:.2f}".replace("-", "−"))

    return [
        ReplyRow(
            "\n\n".join(message["content"] for message in reply.get("prompt", ())),
            " / ".join(reply.get("references", ())),
            side(reply, "before"),
            side(reply, "after"),
        )
        for reply in run.replies()
    ]


def _by_prompt(run: RunFolder, reward: str) -> tuple[list[float], list[float]]:
    """The reward of each reply before and after training; empty if it was not stored by prompt."""
    if not (run.path / "evaluation" / ROWS).is_file():
        return [], []
    values = [row for key, row in read_row_values(run.path / "evaluation").items() if key.kind == PROMPT]
    names = f"{reward}/before", f"{reward}/after"
    found = [[row[name] for name in names] for row in values if all(name in row for name in names)]
    return [row[0] for row in found], [row[1] for row in found]


WIDTH, LEFT, RIGHT = 400, 46, 12
BEFORE, AFTER, TALL, DOT = 60, 142, 46, 4.4
"""Base lines of the two rows of dots, their height, and the diameter of a dot."""


def reward_picture(
    reward: str, figures: Mapping[str, Figure], before: Sequence[float], after: Sequence[float]
) -> Markup:
    """The reward of each reply as a dot, before and after training, with means and their 95 % intervals.

    Args:
        reward: Name of the reward in ``figures``.
        figures: The means before and after, and the change.
        before: Reward of each reply before training; may be empty.
        after: The same after training.
    """
    means = [figures[f"{reward}/{part}"] for part in ("before", "after")]
    change, name = figures[f"{reward}/change"], metric_name(reward)
    ends = [end for mean in means for end in (mean.low, mean.high)]
    marks = ticks(min([*ends, *before, *after]), max([*ends, *before, *after]))

    def across(value: float) -> float:
        return LEFT + (value - marks[0]) / (marks[-1] - marks[0]) * (WIDTH - LEFT - RIGHT)

    parts = []
    for value in marks:
        parts.append(Markup('<path class="grid" d="M{:.1f},6V{}"/>').format(across(value), AFTER))
        parts.append(_text(across(value), AFTER + 14, plain(value), "middle", ""))
    both = [sorted(map(across, values)) for values in (before, after)]
    columns = [_columns(values) for values in both]
    step = min(DOT, TALL / max((len(dots) for side in columns for dots in side.values()), default=1))
    for side, base, mean, found in zip(("before", "after"), (BEFORE, AFTER), means, columns, strict=True):
        for place, dots in found.items():
            for number, _ in enumerate(dots):
                up = base - DOT / 2 - 1 - number * step
                parts.append(
                    Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
                        side, place, up, DOT / 2 - 0.3
                    )
                )
        low, high, middle = across(mean.low), across(mean.high), across(mean.value)
        parts.append(Markup('<path class="axis" d="M{},{}H{}"/>').format(LEFT, base, WIDTH - RIGHT))
        parts.append(
            Markup('<rect class="interval {}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"/>').format(
                side, low, base - TALL - 4, max(high - low, 1), TALL + 4
            )
        )
        parts.append(
            Markup('<path class="mean {}" d="M{:.1f},{}V{}"/>').format(side, middle, base - TALL - 6, base)
        )
        label = f"{mean.value:.2f}".replace("-", "−")
        near = "end" if middle > WIDTH / 2 else "start"
        parts.append(
            _text(middle + (-5 if near == "end" else 5), base - TALL + 2, label, near, f"value {side}")
        )
        parts.append(_text(LEFT - 8, base - 3, side, "end", f"side {side}"))
    parts.append(_arrow(across(means[0].value), across(means[1].value), change))
    about = f"{name} of the replies to {_count(change.n, 'eval prompt')}"
    told = f"{about}: mean {means[0].value:.2f} before training, {means[1].value:.2f} after, change {change.value:+.2f}"
    caption = Markup("<figcaption>{}{}. {}</figcaption>").format(
        about[0].upper(),
        about[1:] + ENDS.get(reward, ""),
        ("One dot per reply. " if before else "") + "Lines: means, with their 95 % intervals.",
    )
    picture = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, AFTER + 20, told, Markup().join(parts)
    )
    return Markup('<figure id="reward">{}{}</figure>').format(picture, caption)


def _columns(places: Sequence[float]) -> dict[float, list[float]]:
    """Dots that would overlap share a column."""
    found: dict[float, list[float]] = {}
    for place in places:
        found.setdefault(math.floor(place / DOT) * DOT + DOT / 2, []).append(place)
    return found


def _arrow(start: float, end: float, change: Figure) -> Markup:
    """From the mean before to the mean after, between the two rows."""
    down, way = BEFORE + 20, math.copysign(1, end - start)
    label = _text((start + end) / 2, down - 4, f"{change.value:+.2f}".replace("-", "−"), "middle", "change")
    if abs(end - start) < 12:
        return label
    tip = end - way
    return label + Markup('<path class="arrow" d="M{:.1f},{}H{:.1f}M{:.1f},{}l{},3.5l{},3.5"/>').format(
        start, down, tip, tip - 4 * way, down - 3.5, 4 * way, -4 * way
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )
