"""How a run selected the tokens of its policy, and which of the weights can be computed again from stored values."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.hidden import masked_keys
from tokenward.objectives.selected import step_seeds
from tokenward.plugins import build, refusal_of
from tokenward.report.collect import RunFolder
from tokenward.scoring.reads import is_online, reads_of, scope_of_scores
from tokenward.scoring.scorers import SCORERS, Scorer, seeded
from tokenward.selection import (
    KeepAll,
    ScoredTokens,
    Selector,
    TopFraction,
    is_signed,
    scope_of,
    selector_of,
    unit_of,
)
from tokenward.selection.weights import weights_of

WEIGHT = "weight"

_NOTES = {
    "pair": "",
    "step": "The tokens are selected online, from the {by} of the current policy. The weights change at every step and are "
    "not stored.",
    "compared": "The tokens are selected by scores that are compared with those of all other responses. These weights are "
    "not stored.",
    "unit": "The weights belong to {unit}, which need the tokenizer. They are not stored.",
    "batch": "The tokens are selected per training batch: a weight depends on the other pairs of its batch, and is not stored.",
    "dataset": "The tokens are selected over the whole data set: a weight depends on all pairs, and is not stored.",
    "refused": "The tokens are selected by code of the recipe's own, which a report does not import; --plugins lets it.",
    "secret": "The tokens are selected with a secret among the recipe's settings, which no file of a run holds. The weights are not stored.",
}
"""Why weights cannot be shown, by what they depend on. Weights that depend on one pair can."""


class RunSelection(NamedTuple):
    """A selection of a run: the policy's own, or that of a term of a sum, such as ``sum/treg``.

    Attributes:
        when: What its weights depend on.
        by: For an online selection, the values of the policy that it reads.
        within: The selections around it; it selects among their tokens.
        own_replies: Whether the policy trains on its own replies, and not on those of the data.
    """

    term: str
    rule: str
    selector: Selector
    when: Literal["pair", "step", "compared", "unit", "batch", "dataset", "refused", "secret"]
    by: str = ""
    within: tuple["RunSelection", ...] = ()
    own_replies: bool = False

    @property
    def channel(self) -> str:
        """Name of its weights on a page."""
        return f"{WEIGHT} of {self.term}" if self.term else WEIGHT

    @property
    def signed(self) -> bool:
        """Whether weights can be negative."""
        return is_signed(self.selector)

    @property
    def nearest(self) -> Selector | None:
        """The selector that approximates it best on a single pair; None if stored values do not show it."""
        if self.when == "pair":
            return self.selector
        if self.when in ("batch", "dataset") and isinstance(self.selector, TopFraction):
            return replace(self.selector, scope="response")
        return None

    @property
    def note(self) -> str:
        """Why its weights are not shown; empty if they are."""
        unit = unit_of(self.selector)
        return _NOTES[self.when].format(by=self.by, unit=unit if unit == "spans" else f"{unit}s")

    @property
    def whole(self) -> str:
        """Why no token is marked although all have weight; empty if some have none."""
        if not isinstance(self.selector, KeepAll) or self.when != "pair":
            return ""
        if self.own_replies:
            return "The policy trains on replies of its own, every token with its reward. The replies here come from the data, so none is marked."
        return "The policy trains on every token, so none is marked."

    def weights(self, tokens: ScoredTokens, ids: Tensor) -> Tensor:
        """Weights of a pair's tokens as in training, from scores and token ids, which seed random choices.  -> [n]"""
        assert self.when == "pair"
        if not self.term:
            return weights_of(self.selector, tokens)
        kept = torch.ones_like(tokens.response, dtype=torch.bool)
        for outer in self.within:
            kept &= outer.weights(tokens, ids) != 0
        seeds = step_seeds(ids, tokens.response, len(tokens.rank))
        drawn = tokens._replace(scores=torch.where(kept, tokens.scores, torch.nan), seeds=seeds)
        return torch.where(kept, weights_of(self.selector, drawn), 0.0)


def policy_scorer(run: RunFolder) -> tuple[str, Scorer] | None:
    """The scorer of the policy's training, with its name; None without a policy."""
    table = run.setting("policy", "scores", "scorer")
    if table is None:
        return None
    name, arguments = _split_name(seeded(table, run.seed))
    return name, build("scorer", name, arguments, SCORERS)


def stored_scorer(run: RunFolder) -> tuple[str, Scorer] | None:
    """The policy's scorer if its scores can be computed from one stored response; otherwise None."""
    if _refused(run):
        return None
    made = policy_scorer(run)
    if made is None or is_online(made[1]) or scope_of_scores(made[1]) != "response":
        return None
    return made


def _refused(run: RunFolder) -> Literal["refused", "secret", ""]:
    """Why the run's scorer or selector is not built; empty if both are."""
    for stage, table in (("policy", "scores"), ("policy", "policy")):
        settings = run.setting(stage, table)
        if settings is not None and refusal_of(settings):
            return "refused"
        if any(masked_keys(settings)):
            return "secret"
    return ""


def scorer_note(run: RunFolder, shown: str) -> str:
    """A sentence if the scores that are shown, of the scorer ``shown``, are not those of the policy's training."""
    if why := _refused(run):
        problem = {
            "refused": "The recipe names code of its own, which a report does not import; --plugins lets it.",
            "secret": "The recipe's scorer or selection has a secret among its settings, which no file of a run holds.",
        }[why]
        return f"{problem} This page shows {shown}."
    made = policy_scorer(run)
    if made is None or stored_scorer(run) is not None:
        return ""
    return f"The scores of the recipe's scorer {made[0]} are not stored. This page shows {shown}."


def selections_of(run: RunFolder) -> list[RunSelection]:
    """All selections of a run, the policy's own first; empty without a policy."""
    if why := _refused(run):
        name, _ = _split_name(run.setting("policy", "policy", "selection"))
        return [RunSelection("", name, KeepAll(), why)]
    made = policy_scorer(run)
    if made is None:
        return []
    name, arguments = _split_name(run.setting("policy", "policy", "selection"))
    selector = selector_of(Named(name=name, arguments=arguments), run.seed)
    if is_online(made[1]):
        when = "step"
    elif scope_of_scores(made[1]) != "response":
        when = "compared"
    else:
        when = _scope(selector, "dataset")
    kinds = {
        {"logp": "log-probability"}.get(read.kind, read.kind) for read in reads_of(made[1]) if read.online
    }
    objective = run.setting("policy", "policy", "objective")
    online = objective["name"] == "reinforce"
    own = RunSelection("", name, selector, when, " and ".join(sorted(kinds)), own_replies=online)
    return [own, *_terms(objective, own, run.seed)]


def selection_named(selections: list[RunSelection], term: str | None) -> RunSelection | None:
    """The selection of a term, or the policy's own for None; None without a policy.

    Raises:
        UserError: no term of this name has its own selection.
    """
    if term is None:
        return selections[0] if selections else None
    for found in selections[1:]:
        if found.term == term:
            return found
    known = ", ".join(found.term for found in selections[1:])
    raise UserError(
        f"no term {term!r} of the policy's objective has its own selection. "
        + (f"Name one of: {known}." if known else "No term has one, so leave the term out."),
        code="unknown-name",
    )


def _scope(selector: Selector, *wider: str) -> Any:
    """What the weights of a selector depend on, given scores of one response."""
    if unit_of(selector):
        return "unit"
    scope = scope_of(selector)
    return scope if scope in ("batch", *wider) else "pair"


def _terms(table: Mapping[str, Any], outer: RunSelection, seed: int) -> Iterator[RunSelection]:
    """Selections of a sum's terms, also inside other sums; several terms of the same name are numbered."""
    if table.get("name") != "sum":
        return
    seed = table.get("seed", seed)
    seen: dict[str, int] = {}
    for term in table["terms"]:
        seen[term["name"]] = seen.get(term["name"], 0) + 1
        number = f" {seen[term['name']]}" if seen[term["name"]] > 1 else ""
        label = f"{outer.term}/{term['name']}{number}".lstrip("/")
        if term.get("selection") is None:
            yield from _terms(term, outer._replace(term=label), seed)
            continue
        name, arguments = _split_name(term["selection"])
        selector = selector_of(Named(name=name, arguments=arguments), seed)
        when = outer.when if outer.when != "pair" else _scope(selector)
        found = RunSelection(label, name, selector, when, outer.by, (*outer.within, outer))
        yield found
        yield from _terms(term, found, seed)


def _split_name(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return table["name"], {key: value for key, value in table.items() if key != "name"}
