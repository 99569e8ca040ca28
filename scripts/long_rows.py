"""Time and peak memory of one training step on a pair of long rows, with a tiny model of two layers, in a process of its own.

    python -m scripts.long_rows sepo 14000

The rows have LENGTH tokens each, a seventh of them the prompt. SePO trains on 30 % of the tokens, DPO on all of them. Peak memory
is that of the process (``VmHWM``, Linux), over what it was when the model was there.
"""

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from tests.tiny import tiny_llama
from tests.training.tools import arguments, language_model, token_row, with_reference
from tokenward.objectives import DPO, Objective, SePO
from tokenward.training.callbacks import memory
from tokenward.training.trainer import TokenTrainer


def main() -> None:
    """Measure and print one line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("objective", choices=["sepo", "dpo"])
    asked.add_argument("length", type=int, help="tokens of a row")
    given = asked.parse_args()
    torch.set_num_threads(1)
    rng, model = random.Random(0), language_model(tiny_llama(max_position_embeddings=2**15))
    prompt = given.length // 7
    ids = [[rng.randrange(256) for _ in range(n)] for n in (prompt, *[given.length - prompt - 1] * 2)]
    row = token_row(ids[0], (ids[1], ids[2]), "long:1")
    before, started = memory()["peak_memory_gb"], time.monotonic()
    if given.objective == "dpo":
        rows, objective = with_reference(model, [row]), DPO()
    else:
        weights = [torch.tensor([float(rng.random() < 0.3) for _ in side]) for side in row.responses]
        rows, objective = [replace(row, weights=weights)], SePO(gamma=1.0)
    chosen: Objective = objective
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(Path(folder), max_steps=1, per_device_train_batch_size=1)
        TokenTrainer(model, chosen, args, rows).train()
    print(
        f"{given.objective}, {given.length} tokens a row: {time.monotonic() - started:.0f} s, "
        f"{1000 * (memory()['peak_memory_gb'] - before):.0f} MB"
    )


if __name__ == "__main__":
    main()
