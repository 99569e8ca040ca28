"""How a run's policy got the weights of its tokens, and which of those weights can be made again from what is stored."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.objectives.selected import step_seeds
from tokenward.plugins import build
from tokenward.report.collect import RunFolder
from tokenward.scoring.reads import is_online, reads_of, scope_of_scores
from tokenward.scoring.scorers import SCORERS, Scorer, seeded
from tokenward.selection import ScoredTokens, Selector, TopFraction, is_signed, scope_of, selector_of, unit_of

WEIGHT = "weight"

When = Literal["pair", "step", "compared", "unit", "batch", "dataset"]
"""What a weight depends on: the stored scores of its pair alone, or something that the stages do not leave."""


class RunSelection(NamedTuple):
    """One selection of a run's policy: the table's own, or that of a term of a sum.

    Attributes:
        term: Name of the term, ``sum/treg`` for one inside another sum; empty for the policy's own.
        rule: Name of the selector.
        selector: The selector.
        when: What its weights depend on.
        by: Of a selection in the step, what of the policy it reads.
        within: The selections that stand around it, among whose tokens it chooses.
    """

    term: str
    rule: str
    selector: Selector
    when: When
    by: str = ""
    within: tuple["RunSelection", ...] = ()

    @property
    def channel(self) -> str:
        """Name of its weights on a page."""
        return f"{WEIGHT} of {self.term}" if self.term else WEIGHT

    @property
    def signed(self) -> bool:
        """Whether its weights may be below 0."""
        return is_signed(self.selector)

    @property
    def nearest(self) -> Selector | None:
        """What shows it as well as one pair can; None where nothing stored does."""
        if self.when == "pair":
            return self.selector
        if self.when in ("batch", "dataset") and isinstance(self.selector, TopFraction):
            return replace(self.selector, scope="response")
        return None

    @property
    def note(self) -> str:
        """In words, why its weights are not shown; empty where they are."""
        unit = unit_of(self.selector)
        return {
            "pair": "",
            "step": f"Tokens were selected in the step, by the policy's own {self.by}: weights change from step to step and are "
            "not stored.",
            "compared": "Tokens were selected by scores that are compared with those of all other responses: weights are not "
            "stored.",
            "unit": f"Weights go by {unit if unit == 'spans' else unit + 's'}, which the tokenizer must cut: they are not stored.",
            "batch": "Tokens were selected step by step: a weight depends on the pairs that were trained beside it, and is "
            "not stored.",
            "dataset": "Tokens were selected among those of all pairs: a weight depends on all of them, and is not stored.",
        }[self.when]

    def weights(self, tokens: ScoredTokens, ids: Tensor) -> Tensor:
        """Weights of a pair's tokens, as the training had them.  -> [n]

        Args:
            tokens: The stored scores.
            ids: ``[n]``, by which a term's selection draws.
        """
        assert self.when == "pair"
        if not self.term:
            return self.selector(tokens)
        drawn = tokens._replace(seeds=step_seeds(ids, tokens.response, len(tokens.rank)))
        weights = self.selector(drawn)
        for outer in self.within:
            weights = torch.where(outer.weights(tokens, ids) != 0, weights, 0.0)
        return weights


def policy_scorer(run: RunFolder) -> tuple[str, Scorer] | None:
    """The scorer that the policy was trained with and its name; None where there is no policy yet."""
    table = run.setting("policy", "scores", "scorer")
    if table is None:
        return None
    return table["name"], build("scorer", *_named(seeded(table, run.seed)), SCORERS)


def stored_scorer(run: RunFolder) -> tuple[str, Scorer] | None:
    """The policy's scorer where its scores are of one response as it is stored; None where they are not, or without policy."""
    made = policy_scorer(run)
    if made is None or is_online(made[1]) or scope_of_scores(made[1]) != "response":
        return None
    return made


def scorer_note(run: RunFolder, shown: str) -> str:
    """In words, that the scores which are shown are not those of the policy's scorer; empty where they are.

    Args:
        run: The run.
        shown: Name of the scorer whose scores are shown.
    """
    made = policy_scorer(run)
    if made is None or stored_scorer(run) is not None:
        return ""
    return f"The scores of the recipe's scorer {made[0]} are not stored; shown is {shown}."


def selections_of(run: RunFolder) -> list[RunSelection]:
    """Every selection of the run's policy, the table's own first; none where there is no policy yet."""
    made = policy_scorer(run)
    if made is None:
        return []
    name, arguments = _named(run.setting("policy", "policy", "selection"))
    selector = selector_of(Named(name=name, arguments=arguments), run.seed)
    kinds = {
        {"logp": "log-probability"}.get(read.kind, read.kind) for read in reads_of(made[1]) if read.online
    }
    own = RunSelection("", name, selector, _when(selector, made[1]), " and ".join(sorted(kinds)))
    return [own, *_terms(run.setting("policy", "policy", "objective"), own, run.seed)]


def selection_named(selections: list[RunSelection], term: str | None) -> RunSelection | None:
    """The selection of a term, or without one the policy's own; None where there is no policy yet.

    Raises:
        UserError: no term of this name has a selection of its own.
    """
    if term is None:
        return selections[0] if selections else None
    for found in selections[1:]:
        if found.term == term:
            return found
    known = ", ".join(found.term for found in selections[1:])
    raise UserError(
        f"no term {term!r} of the policy's objective has a selection of its own. "
        + (f"Name one that has: {known}." if known else "None has one here; leave the term out.")
    )


def _when(selector: Selector, scorer: Scorer) -> When:
    if is_online(scorer):
        return "step"
    if scope_of_scores(scorer) != "response":
        return "compared"
    if unit_of(selector):
        return "unit"
    scope = scope_of(selector)
    return "batch" if scope == "batch" else "dataset" if scope == "dataset" else "pair"


def _terms(table: Mapping[str, Any], outer: RunSelection, seed: int) -> Iterator[RunSelection]:
    """Selections of a sum's terms, and of the terms of a sum in it; two terms of one name are numbered."""
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
        name, arguments = _named(term["selection"])
        selector = selector_of(Named(name=name, arguments=arguments), seed)
        scope = scope_of(selector)
        alone: When = "unit" if unit_of(selector) else "batch" if scope == "batch" else "pair"
        when = outer.when if outer.when != "pair" else alone
        found = RunSelection(label, name, selector, when, outer.by, (*outer.within, outer))
        yield found
        yield from _terms(term, found, seed)


def _named(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return table["name"], {key: value for key, value in table.items() if key != "name"}
