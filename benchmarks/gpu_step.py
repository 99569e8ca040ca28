"""What a GPU does with tokenward: the CPU's results, no waiting, and its speed and memory beside TRL's; see the options.

    python -m benchmarks.gpu_step                      # on a machine with a GPU, under ten minutes
    python -m benchmarks.gpu_step --device cpu --tiny  # tries the script itself

It prints what it finds, writes it as JSON, and ends with status 1 if the device's results differ from the CPU's, or if a
training step waits for the device.
"""

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.data import random_ids, random_weights, with_reference
from benchmarks.folders import byte_tokenizer
from benchmarks.gpu_checks import attention_kernels, equal_to_cpu, waits
from benchmarks.model import Pair, Shape, training_step
from benchmarks.options import settings_of
from benchmarks.results import FOLDER, machine
from benchmarks.statistics import paired_ratio
from benchmarks.turns import Side, Turns, same_mathematics, take_turns
from tokenward.models.loading import load_model
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import TokenRow

VOCABULARY = 32_000
TINY = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "inner": 64, "spread": 0.2}
CHECKED = {"layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "inner": 128, "spread": 0.2}
TIMED = {"layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "inner": 8192, "spread": 0.02}
"""Sizes of the models and the spread of their weights, large enough where results are compared that a wrong mask or position
shows. The last sizes are those of Llama 3.2 1B."""

CLOSE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How close the sides' losses of the first batch must be before they are timed."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    made.add_argument(
        "--tiny", action="store_true", help="use tiny models and few steps; the times mean nothing"
    )
    made.add_argument("--repetitions", type=int, default=12, help="measured steps of each side")
    made.add_argument("--threads", type=int, default=4, help="torch threads of each side")
    made.add_argument("--out", type=Path, default=FOLDER / "gpu" / "step.json", help="file for the results")
    made.add_argument("--skip-speed", action="store_true", help="only compare with the CPU")
    return made


def make_model(
    target: Path, *, layers: int, width: int, heads: int, kv_heads: int, inner: int, spread: float
) -> str:
    """A random Llama with tied embeddings and a byte tokenizer."""
    tokenizer: Any = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY if layers > TINY["layers"] else len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=spread,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def checked_rows(folder: str, vocabulary: int, *, tiny: bool) -> list[TokenRow]:
    """Pairs of different lengths with a selection and reference values; one response is longer than a block."""
    size = 1 if tiny else 4
    lengths = [(40, (30, 55)), (9, (170, 12)), (25, (1, 8)), (64, (33, 33))]
    pairs = [Pair(size * prompt, tuple(size * length for length in both)) for prompt, both in lengths]
    rows = random_ids(pairs, vocabulary=vocabulary)
    # The reference values are moved off those of the model: at the reference DPO's gradient says little.
    values = token_values(load_model(folder, device="cpu"), rows, precision="float32", tokens_per_batch=4096)
    moved = [[value - 0.1 * torch.cos(torch.arange(len(value))) for value in row] for row in values]
    return with_reference(random_weights(rows, 0.3), moved)


def check(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Results against the CPU's, the attention kernels, and whether a step waits."""
    sizes = TINY if options.tiny else CHECKED
    folder = make_model(scratch / "checked", **sizes)
    vocabulary = json.loads((scratch / "checked" / "config.json").read_text())["vocab_size"]
    rows = checked_rows(folder, vocabulary, tiny=options.tiny)
    cases = equal_to_cpu(folder, rows, options.device)
    print(f"\n{options.device} against the CPU in float32: loss, gradient (relative), score (nats)")
    for case in cases:
        figures = "  ".join(f"{case[name]:.1e}" for name in ("loss", "gradient", "score"))
        label = f"{case['objective']:5}{case['layout']:9}{case['precision']:9}"
        print(f"  {label} {figures}  {'within' if case['within'] else 'TOO FAR'}")
    kernels = attention_kernels(folder, rows, options.device)
    print("\nattention")
    for name, seen in kernels.items():
        print(f"  {name}: {json.dumps(seen)}")
    waiting = waits(folder, rows, options.device, scratch / "training")
    if options.device.startswith("cuda"):
        print(f"\na step waits for the device: {waiting or 'no'}")
    return {"equal": cases, "attention": kernels, "waits": waiting}


def speed(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Steps of SePO and DPO beside TRL's DPO step, in turns, on the same pairs."""
    folder = make_model(scratch / "timed", **(TINY if options.tiny else TIMED))
    vocabulary = json.loads((scratch / "timed" / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    most = 24 if options.tiny else 512
    lengths = [
        Pair(first, (second, third))
        for first, second, third in torch.randint(most // 8, most, (32, 3), generator=generator).tolist()
    ]
    precision = "float32" if options.device == "cpu" else "bfloat16"
    liger = find_spec("liger_kernel") is not None and not options.tiny
    given = argparse.Namespace(
        model=folder, pairs="", threads=options.threads, seed=0, quick=options.tiny, first=0
    )
    common = settings_of(
        given,
        precision=precision,
        device=options.device,
        lengths=[list(pair) for pair in lengths],
        ids=vocabulary,
        batch=4 if options.tiny else 8,
        own={"tokens_per_forward": 16384},
        peer={"use_liger_kernel": True} if liger else {},
    )
    sides = {
        "sepo": Side("benchmarks.ours:training", common | {"objective": "sepo"}),
        "dpo": Side("benchmarks.ours:training", common | {"objective": "dpo"}),
        "trl_dpo": Side("benchmarks.peers:dpo", common),
    }
    repetitions = 2 if options.tiny else options.repetitions
    turns = take_turns(sides, repetitions=repetitions, warm_up=1 if options.tiny else 4)
    apart = same_mathematics(turns.losses, ["dpo", "trl_dpo"], within=CLOSE[precision])
    found = figures(turns, folder, lengths, common["batch"])
    print(f"\nsteps of {common['batch']} pairs in {precision}, TRL {'with' if liger else 'without'} Liger")
    for name, values in found.items():
        print(f"  {name:8} {json.dumps(values)}")
    facts = {"precision": precision, "liger": liger, "loss_difference": apart, "seconds": turns.seconds}
    return {"sides": found, "rate": turns.rates.operations, **facts}


def figures(turns: Turns, folder: str, lengths: list[Pair], batch: int) -> dict[str, dict[str, Any]]:
    """Tokens per second, share of the device's rate, peak memory and speed beside TRL, of each side.

    Tokens are those of the pairs, with each prompt counted once, so they compare sides. The share is the operations that
    the side's own rows need, without recomputation, over what the device does in bare products of the same type.
    """
    shape = Shape.of(LlamaConfig.from_pretrained(folder))
    tokens = sum(pair.prompt + sum(pair.responses) for pair in lengths) * batch / len(lengths)
    found = {}
    for name, seconds in turns.seconds.items():
        middle, memory = median(seconds), turns.memory[name]
        found[name] = {
            "tokens_per_second": round(tokens / middle, 1),
            "peak_gb": round(memory.get("cuda", memory["VmHWM"]) / 1e9, 3),
        }
        if name in ("sepo", "dpo"):
            costs = [training_step(shape, layout, head_passes=3) for layout in turns.layouts(name, batch)]
            needed = sum(cost.products + cost.attention for cost in costs) / len(costs)
            found[name]["share_of_the_rate"] = round(needed / middle / turns.rates.operations, 3)
            ratio = paired_ratio(turns.seconds["trl_dpo"], seconds)
            found[name]["times_trl"] = [round(value, 3) for value in ratio]
    return found


def main() -> int:
    """Run everything, and say what was found."""
    options = parser().parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_step was not run: torch sees no CUDA device. --device cpu --tiny tries the script.")
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu_step") as folder:
        scratch = Path(folder)
        found: dict[str, Any] = {"device": options.device, "tiny": options.tiny, "machine": machine()}
        if options.device.startswith("cuda"):
            found["gpu"] = torch.cuda.get_device_name()
        found["checks"] = check(options, scratch)
        if not options.skip_speed:
            found["speed"] = speed(options, scratch)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [case for case in found["checks"]["equal"] if not case["within"]]
    print(f"\nwritten to {options.out}; {len(wrong)} comparisons with the CPU are too far apart")
    return int(bool(wrong or found["checks"]["waits"]))


if __name__ == "__main__":
    sys.exit(main())
