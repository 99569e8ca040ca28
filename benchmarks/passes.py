"""Workers of the scoring claim: log-probabilities of response tokens under two frozen models."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from benchmarks.gate import nudge
from benchmarks.ours import encoded_of, load, shown_settings
from benchmarks.workers import Channel, serve
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import TokenRow

TOKENS_PER_BATCH = 8192
"""The default of ``scores.tokens_per_batch``."""

TRL_BATCH = 8
"""TRL's default batch for precomputing, which is transformers' default batch per device."""


def timed(sums: Any, started: float) -> dict[str, Any]:
    """The answer: time, and the sum of each response, for comparing the sides."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"seconds": perf_counter() - started, "sums": sums}


def lengths(rows: Sequence[TokenRow]) -> list[Any]:
    """Lengths of the comparisons, for the parent process."""
    return [
        [len(row.prompt), [len(ids) for ids in row.responses], sum(map(len, row.responses))] for row in rows
    ]


def ours(channel: Channel, settings: dict[str, Any]) -> None:
    """Tokenward's pass over reference and oracle, in batches by length with each prompt once."""
    reference, oracle = load(settings), load(settings)
    nudge(oracle.model)
    rows = list(encoded_of(settings))

    def score(request: dict[str, Any]) -> dict[str, Any]:
        part = rows[request["start"] : request["stop"]]
        started = perf_counter()
        found = [
            token_values(model, part, precision=settings["precision"], tokens_per_batch=TOKENS_PER_BATCH)
            for model in (reference, oracle)
        ]
        return timed([[float(v.sum()) for row in values for v in row] for values in found], started)

    facts = {
        "lengths": lengths(list(rows)),
        "settings": {"tokens_per_batch": TOKENS_PER_BATCH},
    }
    serve(channel, {"score": score}, facts)


def published(channel: Channel, settings: dict[str, Any]) -> None:
    """The pattern of SePO's published code: one response at a time, float32, gradients enabled, full logits.

    Reimplemented: full logits of prompt and response for both models, ``log_softmax`` over the vocabulary at every
    position, then one value gathered from each.
    """
    from benchmarks.peers import load as load_plain

    reference, oracle = (load_plain(settings).eval() for _ in range(2))
    nudge(oracle)
    rows = encoded_of(settings)

    def sum_of(model: Any, prompt: list[int], response: list[int]) -> float:
        ids = torch.tensor([prompt + response], device=settings["device"])
        logits = model(ids).logits.cpu()
        logp = logits[:, :-1].log_softmax(-1)
        gathered = logp.gather(-1, ids[:, 1:, None].cpu()).squeeze(-1)
        return float(gathered[0, len(prompt) - 1 :].detach().sum())

    def score(request: dict[str, Any]) -> dict[str, Any]:
        started = perf_counter()
        sums: list[list[float]] = [[], []]
        for row in rows[request["start"] : request["stop"]]:
            for response in row.responses:
                for place, model in enumerate((reference, oracle)):
                    sums[place].append(sum_of(model, row.prompt, response))
        return timed(sums, started)

    serve(channel, {"score": score}, {"lengths": lengths(rows), "settings": {"batch": 1, "no_grad": False}})


def trl_reference(channel: Channel, settings: dict[str, Any]) -> None:
    """TRL's reference pass, ``compute_ref_log_probs``, on the batches of its precomputation."""
    from benchmarks.peers import dpo_trainer

    trainer = dpo_trainer(settings | {"batch": TRL_BATCH}, precompute=False)
    # TRL gives a separate reference a leaner fused head than the policy, which it would use otherwise.
    reference = trainer.ref_model

    def score(request: dict[str, Any]) -> dict[str, Any]:
        started = perf_counter()
        sums: list[float] = []
        for start in range(request["start"], request["stop"], TRL_BATCH):
            sums += _batch(trainer, reference, range(start, min(start + TRL_BATCH, request["stop"])))
        return timed([sums, []], started)

    serve(channel, {"score": score}, {"settings": shown_settings(trainer) | {"batch": TRL_BATCH}})


def _batch(trainer: Any, model: Any, indices: Sequence[int]) -> list[float]:
    """Sums of a batch: chosen, then rejected, of each pair."""
    inputs: Mapping[str, Any] = trainer._prepare_inputs(
        trainer.data_collator([trainer.train_dataset[index] for index in indices])
    )
    chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
    return torch.stack((chosen, rejected), dim=1).flatten().tolist()
