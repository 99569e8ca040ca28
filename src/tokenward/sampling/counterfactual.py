"""Critical tokens: those without which a model's right answer goes wrong (CFT, arXiv 2510.10974)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenward.artifacts import atomic_write
from tokenward.models.loading import LanguageModel
from tokenward.ops.representation import other_tokens
from tokenward.plugins import find
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.sampling.sources.base import call_source
from tokenward.scoring.model_scorers import predicting_states
from tokenward.scoring.reads import Value
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.template import Template


class Verifier(NamedTuple):
    """Judges completions of one prompt.

    Attributes:
        name: As the recipe has it.
        judge: The function.
    """

    name: str
    judge: Callable[..., Any]

    def accepts(
        self, row: TokenRow, completions: Sequence[str], ids: Sequence[list[int]], reference: str
    ) -> list[bool]:
        """Whether each completion is right."""
        count = len(completions)
        prompts = [row.comparison.prompt[-1]["content"]] * count
        columns = {"references": [[reference]] * count}
        where = [row.comparison.source] * count
        found = call_source(self.name, self.judge, prompts, completions, ids, columns, where, kind="verifier")
        return [value > 0 for value in found]


def critical_tokens(
    model: LanguageModel,
    template: Template,
    rows: Sequence[TokenRow],
    value: Value,
    file: Path,
    *,
    batch: int,
) -> list[list[Tensor]]:
    """1 at critical tokens, 0 at others, NaN throughout a response that is not accepted.  -> per row, per response, [len]

    Args:
        model: Continues.
        template: Says what ends a response.
        rows: Prompts with their responses.
        value: Names the verifier and how many other tokens are tried.
        file: Holds what is known of each response already, a line each; what is new is added, so that a run which was
            stopped does not begin again.
        batch: Continuations at a time.
    """
    name = value.details["verifier"]
    verifier = Verifier(name, find("verifier", name, {}))
    known = _known(file)
    found = []
    for row in rows:
        mine = []
        for place, key in enumerate(keys_of(row.comparison)):
            if key not in known:
                known[key] = _critical(model, template, row, place, value, verifier, batch)
                _note(file, key, known[key])
            mine.append(torch.tensor(known[key], dtype=torch.float32))
        found.append(mine)
    return found


def _critical(
    model: LanguageModel,
    template: Template,
    row: TokenRow,
    place: int,
    value: Value,
    verifier: Verifier,
    batch: int,
) -> list[float]:
    ids, response = row.responses[place], row.comparison.responses[place]
    if not verifier.accepts(row, [response], [ids], response)[0]:
        return [float("nan")] * len(ids)
    tried = _others(model, row.only(place), value.details["candidates"])
    read, places = row.whole(place)
    starts = [[*read[: places[at]], other] for at, others in enumerate(tried) for other in others]
    whole = _continued(model, template, row.prompt, starts, value.details["max_new_tokens"], batch)
    replies = [item[places[0] :] for item in whole]
    texts = [str(template.tokenizer.decode(item, skip_special_tokens=True)) for item in replies]
    right = torch.tensor(verifier.accepts(row, texts, replies, response)).view(len(ids), -1)
    return (~right.any(1)).float().tolist()


@torch.inference_mode()
def _others(model: LanguageModel, row: TokenRow, count: int) -> list[list[int]]:
    """The most probable other tokens at each place of a response.  -> [len][count]"""
    model.model.eval()
    batch = model.collate([row]).to(model.device)
    states, head = predicting_states(model, batch)
    return other_tokens(states, batch.tokens.ids, head, count).tolist()


def _continued(
    model: LanguageModel,
    template: Template,
    prompt: list[int],
    starts: Sequence[list[int]],
    longest: int,
    batch: int,
) -> list[list[int]]:
    """Beginnings of a response, each written to its end with the most probable tokens."""
    eos = set(template.eos_ids)
    going = [start for start in starts if start[-1] not in eos]
    settings = SamplingSettings(max_new_tokens=longest, temperature=0.0, batch=batch)
    replies = iter(sample_replies(model, template, [[*prompt, *start] for start in going], settings, seed=0))
    return [start if start[-1] in eos else [*start, *next(replies).ids] for start in starts]


def _known(file: Path) -> dict[str, list[float]]:
    """What a run before this one found; a line that was cut off by a stop is taken away."""
    if not file.is_file():
        return {}
    *lines, cut = file.read_text().split("\n")
    if cut:
        atomic_write(file, "".join(f"{line}\n" for line in lines))
    return dict(json.loads(line) for line in lines)


def _note(file: Path, key: str, critical: list[float]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps([key, critical]) + "\n")
