"""tokenward's SePO and DPO steps against TRL's DPO step in one run, and SePO's against TRL's SimPO step in another.

The first run measures two claims, ``sepo_step`` and ``oracle_step``, which share TRL's DPO step. The second run is
separate because all four processes do not fit into 24 GB.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig

from benchmarks.folders import folder_of
from benchmarks.memory import status_bytes
from benchmarks.model import Layout, Shape, separate, training_peak, training_step
from benchmarks.options import public, settings_of
from benchmarks.results import Result
from benchmarks.statistics import Ratio, paired_ratio
from benchmarks.turns import Side, Turns, same_mathematics, take_turns
from tokenward.ops.tiles import TILE_ELEMENTS

TRL_TILE_ROWS, TRL_TILE_COLUMNS = 4096, 32768
WARM_UP = 2
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2}
TARGETS = {"sepo": ">= 4.0", "dpo": ">= 3.5", "memory": "<= 0.4", "simpo": "reported"}


def sides_of(options: argparse.Namespace, precision: str, **changes: Any) -> dict[str, Side]:
    """The four workers: three take part in the first run, two in the second."""
    common = settings_of(options, precision=precision, **changes)
    return {
        "sepo": Side("benchmarks.ours:training", common | {"objective": "sepo"}),
        "dpo": Side("benchmarks.ours:training", common | {"objective": "dpo"}),
        "trl_dpo": Side("benchmarks.peers:dpo", common),
        "trl_simpo": Side("benchmarks.peers:simpo", common),
    }


def measure(
    options: argparse.Namespace,
    precision: str,
    *,
    suffix: str,
    checkpointing: bool = False,
    **changes: Any,
) -> list[Result]:
    """Measure speed and memory of SePO and the oracle.

    Args:
        options: From the command line.
        precision: Precision of both sides.
        suffix: Suffix of the claims' names.
        checkpointing: Whether tokenward's side uses activation checkpointing.
        changes: Changes to the settings of both sides.
    """
    own = {"activation_checkpointing": True} if checkpointing else {}
    sides = sides_of(options, precision, own=own, **changes)
    peer = {"dpo": "trl_dpo", "simpo": "trl_simpo"}
    turns = take_turns(
        {name: side for name, side in sides.items() if name != peer["simpo"]},
        repetitions=options.repetitions,
        warm_up=WARM_UP,
    )
    second = take_turns(
        {name: sides[name] for name in ("sepo", peer["simpo"])},
        repetitions=max(2, options.repetitions // 2),
        warm_up=WARM_UP,
    )
    within = CLOSE[precision]
    differences = {
        "dpo": same_mathematics(turns.losses, ["dpo", "trl_dpo"], within=within),
        "simpo": same_mathematics(second.losses, ["sepo", "trl_simpo"], within=within),
    }
    shape = Shape.of(AutoConfig.from_pretrained(folder_of(options.model)))
    predicted = predictions(shape, turns, batch=sides["sepo"].settings["batch"], recomputed=checkpointing)
    settings = {
        "common": public(dict(sides["sepo"].settings)),
        "sides": {name: facts["settings"] for name, facts in (turns.facts | second.facts).items()},
        "first_batch_loss_before_and_after": second.losses | turns.losses,
        "loss_differences": differences,
        "rates": turns.rates._asdict(),
        "warm_up_steps": WARM_UP,
    }
    speed = {
        f"sepo_step_{suffix}": (TARGETS["sepo"], "sepo", "trl_dpo"),
        f"sepo_step_{suffix}_against_simpo": (TARGETS["simpo"], "sepo", "trl_simpo"),
        f"oracle_step_{suffix}": (TARGETS["dpo"], "dpo", "trl_dpo"),
    }
    results = [
        result(
            options,
            second if words[2] == peer["simpo"] else turns,
            claim,
            *words,
            predicted=predicted[words[1:]],
            settings=settings,
        )
        for claim, words in speed.items()
    ]
    memory = {f"sepo_memory_{suffix}": "sepo", f"oracle_memory_{suffix}": "dpo"}
    return results + [
        memory_result(options, turns, claim, name, predicted[(name, "memory")], settings)
        for claim, name in memory.items()
    ]


def result(
    options: argparse.Namespace,
    turns: Turns,
    claim: str,
    target: str,
    ours: str,
    peer: str,
    *,
    predicted: float,
    settings: dict[str, Any],
) -> Result:
    """Result of the steps of two sides on the same batches."""
    mine = turns.seconds[ours]
    ratio: Ratio = paired_ratio(turns.seconds[peer], mine)
    batch = settings["common"]["batch"]
    return Result(
        claim=claim,
        target=target,
        ratio=ratio.value,
        low=ratio.low,
        high=ratio.high,
        ours={"side": ours, "pairs_per_second": batch * len(mine) / sum(mine), "seconds": mine},
        peer={
            "side": peer,
            "pairs_per_second": batch * len(mine) / sum(turns.seconds[peer]),
            "seconds": turns.seconds[peer],
            "ratio_of_sums": ratio.overall,
        },
        repetitions=len(mine),
        predicted=predicted,
        settings=settings,
        quick=options.quick,
    )


def memory_result(
    options: argparse.Namespace,
    turns: Turns,
    claim: str,
    ours: str,
    predicted: float,
    settings: dict[str, Any],
) -> Result:
    """Peak memory of a tokenward process relative to TRL's DPO process."""
    key = "cuda" if "cuda" in turns.memory[ours] else "VmHWM"
    ratio = turns.memory[ours][key] / turns.memory["trl_dpo"][key]
    return Result(
        claim=claim,
        target=TARGETS["memory"] if ours == "sepo" else "reported",
        ratio=ratio,
        low=ratio,
        high=ratio,
        ours=turns.memory[ours],
        peer=turns.memory["trl_dpo"],
        repetitions=1,
        predicted=predicted,
        settings=settings,
        quick=options.quick,
    )


def predictions(shape: Shape, turns: Turns, *, batch: int, recomputed: bool) -> dict[tuple[str, str], float]:
    """Ratios predicted by the cost model, over all batches in each side's layout."""
    pairs = turns.pairs("sepo")
    plain = [separate(pairs[start : start + batch]) for start in range(0, len(pairs), batch)]
    layouts = {"sepo": turns.layouts("sepo", batch), "dpo": turns.layouts("dpo", batch), "trl_dpo": plain}
    time = {
        name: sum(
            training_step(shape, item, recomputed=recomputed and name != "trl_dpo").seconds(turns.rates)
            for item in items
        )
        for name, items in layouts.items()
    }
    # All logits exist at once and are copied: more bytes moved, but nothing is recomputed.
    time["trl_simpo"] = sum(
        training_step(shape, item, head_passes=3, logit_passes=12).seconds(turns.rates) for item in plain
    )
    # This process has the same imports as the workers, and little else in memory.
    base = status_bytes("VmRSS")["VmRSS"]
    tile = int(TRL_TILE_ROWS * min(1.0, TRL_TILE_COLUMNS / shape.vocabulary))
    own_tile = TILE_ELEMENTS // shape.vocabulary
    held = {
        name: base
        + (
            peak(shape, items, tile)
            if name == "trl_dpo"
            else peak(shape, items, own_tile, recomputed=recomputed)
        )
        for name, items in layouts.items()
    }
    ratios = [("sepo", "trl_dpo"), ("sepo", "trl_simpo"), ("dpo", "trl_dpo")]
    return {
        **{(ours, peer): time[peer] / time[ours] for ours, peer in ratios},
        **{(name, "memory"): held[name] / held["trl_dpo"] for name in ("sepo", "dpo")},
    }


def peak(shape: Shape, layouts: Sequence[Layout], chunk: int, *, recomputed: bool = False) -> int:
    """Peak bytes over all batches, without interpreter and libraries.

    Args:
        shape: Shape of the model.
        layouts: Layouts of the batches.
        chunk: Largest number of rows whose logits exist at the same time.
        recomputed: See :func:`benchmarks.model.training_peak`.
    """
    return max(
        training_peak(
            shape,
            item,
            logit_rows=min(item.head_rows, chunk),
            logit_copies=3,
            recomputed=recomputed,
        )
        for item in layouts
    )
