"""Critical tokens: those whose replacement makes a model's correct answer wrong (CFT, arXiv 2510.10974)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenward.artifacts import atomic_write
from tokenward.models.loading import LanguageModel
from tokenward.models.sharding import reading
from tokenward.ops.representation import other_tokens
from tokenward.plugins import find
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.sampling.sources import call_source
from tokenward.scoring.model_scorers import predicting_states
from tokenward.scoring.reads import Value
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.template import Template


def critical_tokens(
    model: LanguageModel,
    template: Template,
    rows: Sequence[TokenRow],
    value: Value,
    file: Path,
    *,
    batch: int,
) -> list[list[Tensor]]:
    """1 at critical tokens, 0 at others, NaN throughout a response that is wrong itself.  -> per row, per response, [len]

    ``file`` caches known results, one response per line; new ones are appended, so that an interrupted run continues.
    ``batch`` is the number of continuations per ``generate`` call.
    """
    name = value.details["verifier"]
    search = CriticalSearch(model, template, value.details, find("verifier", name, {}), batch)
    known = _known(file)
    found = []
    for row in rows:
        mine = []
        for place, key in enumerate(keys_of(row.comparison)):
            if key not in known:
                known[key] = search.critical(row, place)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as out:
                    out.write(json.dumps([key, known[key]]) + "\n")
            mine.append(torch.tensor(known[key], dtype=torch.float32))
        found.append(mine)
    return found


def _known(file: Path) -> dict[str, list[float]]:
    """The results of an earlier run; a line that was cut off is removed."""
    if not file.is_file():
        return {}
    *lines, cut = file.read_text().split("\n")
    if cut:
        atomic_write(file, "".join(f"{line}\n" for line in lines))
    return dict(json.loads(line) for line in lines)


@dataclass(frozen=True, slots=True)
class CriticalSearch:
    """Finds the critical tokens of one response at a time."""

    model: LanguageModel
    template: Template
    details: Mapping[str, Any]
    judge: Callable[..., Any]
    batch: int

    def critical(self, row: TokenRow, place: int) -> list[float]:
        """See :func:`critical_tokens`; ``place`` is the response's index in the row.  -> [len]"""
        ids, response = row.responses[place], row.comparison.responses[place]
        if not self._correct(row, [response], [ids], response)[0]:
            return [float("nan")] * len(ids)
        tried = self._alternatives(row.only(place))
        read, places = row.whole(place)
        starts = [[*read[: places[at]], other] for at, others in enumerate(tried) for other in others]
        replies = [item[places[0] :] for item in self._continued(row.prompt, starts)]
        texts = [str(self.template.tokenizer.decode(item, skip_special_tokens=True)) for item in replies]
        right = torch.tensor(self._correct(row, texts, replies, response)).view(len(ids), -1)
        return (~right.any(1)).float().tolist()

    def _correct(
        self, row: TokenRow, completions: Sequence[str], ids: Sequence[list[int]], reference: str
    ) -> list[bool]:
        count = len(completions)
        prompts = [row.comparison.prompt[-1]["content"]] * count
        columns = {"references": [[reference]] * count}
        where = [row.comparison.source] * count
        name = self.details["verifier"]
        scores = call_source(name, self.judge, prompts, completions, ids, columns, where, kind="verifier")
        return [score > 0 for score in scores]

    def _alternatives(self, row: TokenRow) -> list[list[int]]:
        """The most probable other tokens at each place of a response.  -> [len][candidates]"""
        self.model.model.eval()
        batch = self.model.collate([row]).to(self.model.device)
        with reading(self.model.model):
            states, head = predicting_states(self.model, batch)
            return other_tokens(states, batch.tokens.ids, head, self.details["candidates"]).tolist()

    def _continued(self, prompt: list[int], starts: Sequence[list[int]]) -> list[list[int]]:
        """Beginnings of a response, each continued greedily to its end."""
        eos = set(self.template.eos_ids)
        open_prompts = [[*prompt, *start] for start in starts if start[-1] not in eos]
        longest = self.details["max_new_tokens"]
        settings = SamplingSettings(max_new_tokens=longest, temperature=0.0, batch=self.batch)
        replies = iter(sample_replies(self.model, self.template, open_prompts, settings, seed=0))
        return [start if start[-1] in eos else [*start, *next(replies).ids] for start in starts]
