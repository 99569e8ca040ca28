"""Write the tables of ``docs/scaling.md`` that are computed: bytes of a device and hours of a stage for large models.

    python -m scripts.scaling_page           # print them
    python -m scripts.scaling_page --write   # write them into the page

They come from the same functions as ``tokenward plan --devices``. Nothing in them is measured, except where they say so.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.model import Shape
from tokenward.ops.costs import FLOAT, HALF, ModelSizes, NumberTypes, Work, forward_operations
from tokenward.tools.plan_devices import LINKS, PER_NODE, RATES, ScoringWork, TrainingWork, Wanted
from tokenward.tools.plan_words import size
from tokenward.training.arguments import TokenTrainingArguments

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- computed: begin -->", "<!-- computed: end -->"

PROMPT, REPLY, REPLIES = 256, 256, 2  # tokens of a pair
SELECTED = 0.3  # of a reply, in SePO
TOKENS_PER_FORWARD = 8192
BATCH = 16  # pairs of a device per update
DEVICES, PAIRS, MEMORY = (8, 64), (1_000_000, 10_000_000), 80e9
RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3(Shape):
    """A Llama 3, whose embeddings are not tied."""

    name: str

    def products(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the matrices of a layer."""
        attention, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        square = [(self.width, attention), (self.width, keys), (self.width, keys), (attention, self.width)]
        return [*square, (self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]

    def sizes(self, *, lora: bool) -> ModelSizes:
        """Its sizes, trained whole or with an adapter of rank 16 on every matrix of the layers."""
        products = self.layers * sum(one * other for one, other in self.products())
        head = self.width * self.vocabulary
        norms = self.width * (2 * self.layers + 1)
        adapter = self.layers * RANK * sum(one + other for one, other in self.products())
        weights = products + norms + 2 * head
        return ModelSizes(
            weights=weights + (adapter if lora else 0),
            trained=adapter if lora else weights,
            products=products + norms,
            head=head,
            layers=self.layers,
            width=self.width,
            attention=self.heads * self.head_dim,
            inner=self.inner,
            vocabulary=self.vocabulary,
        )


MODELS = (
    Llama3(
        name="8B", layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, inner=14336, vocabulary=128256
    ),
    Llama3(
        name="70B", layers=80, width=8192, heads=64, kv_heads=8, head_dim=128, inner=28672, vocabulary=128256
    ),
)


def pair(kept: float) -> Work:
    """Work of a pair of which a share of the reply tokens has a weight."""
    replies = REPLIES * REPLY
    return Work(PROMPT + replies, kept * replies, PROMPT**2 / 2 + REPLIES * (REPLY * PROMPT + REPLY**2 / 2))


def training(shape: Llama3, *, lora: bool, kept: float, rows: int) -> TrainingWork:
    """A training of one epoch: bfloat16 with activation checkpointing. Under LoRA the frozen weights are bfloat16 too."""
    return TrainingWork(
        key="policy",
        table={"fsdp": True},
        sizes=shape.sizes(lora=lora),
        lora=shape.sizes(lora=True),
        types=NumberTypes(HALF if lora else FLOAT, HALF),
        largest=lambda tokens: pair(kept).times(tokens / pair(kept).tokens),
        mean=pair(kept),
        rows=rows,
        budget=TOKENS_PER_FORWARD,
        checkpointing=True,
        reference=False,
    )


def scoring(shape: Llama3, rows: int) -> ScoringWork:
    """A pass over every pair without gradients, in bfloat16."""
    sizes = shape.sizes(lora=False)
    largest = pair(1.0).times(TOKENS_PER_FORWARD / pair(1.0).tokens)
    operations = rows * forward_operations(sizes, pair(1.0))
    return ScoringWork(sizes=sizes, types=NumberTypes(HALF, HALF), largest=largest, operations=operations)


def memory_rows() -> Iterator[list[str]]:
    """Bytes of a device."""
    for shape in MODELS:
        for count in DEVICES:
            for name, work, engine in _trainings(shape):
                wanted = Wanted(count, MEMORY, engine)
                found = work.memory(wanted)
                cells = [size(part) if part else "" for part in (*found[:5], found.whole)]
                yield [shape.name, name, str(count), *cells, size(found.total), _fits(found.total)]
        found = scoring(shape, 1).memory()
        cells = [size(part) if part else "" for part in (*found[:5], found.whole)]
        yield [shape.name, "reference, scores", "any", *cells, size(found.total), _fits(found.total)]


def _trainings(shape: Llama3) -> list[tuple[str, TrainingWork, Any]]:
    full, lora = (training(shape, lora=lora, kept=1.0, rows=1) for lora in (False, True))
    return [
        ("full, FSDP2", full, "fsdp2"),
        ("full, FSDP2, bfloat16 weights", replace(full, types=NumberTypes(HALF, HALF)), "fsdp2"),
        ("full, ZeRO-2", full, "zero2"),
        ("full, ZeRO-3", full, "zero3"),
        ("LoRA, DDP", lora, "ddp"),
        ("LoRA, FSDP2", lora, "fsdp2"),
    ]


def _fits(total: float) -> str:
    return "yes" if total <= MEMORY else "**no**"


def hour_rows() -> Iterator[list[str]]:
    """Hours of the stages that compute with a model."""
    for shape in MODELS:
        for count in DEVICES:
            for rows in PAIRS:
                wanted = Wanted(count, MEMORY, "fsdp2")
                once = scoring(shape, rows)
                cells = [_hours(once.seconds(wanted), once.memory().total)] * 2
                for lora in (False, True):
                    cells += [_trained(shape, lora, kept, rows, wanted) for kept in (1.0, SELECTED)]
                yield [shape.name, str(count), f"{rows:,}", *cells]


def _hours(seconds: float, held: float) -> str:
    text = f"{seconds / 3600:,.1f}"
    return text if held <= MEMORY else f"({text})"


def _trained(shape: Llama3, lora: bool, kept: float, rows: int, wanted: Wanted) -> str:
    batch = BATCH * wanted.count
    arguments = TokenTrainingArguments(output_dir="unused", use_cpu=True, per_device_train_batch_size=BATCH)
    work = training(shape, lora=lora, kept=kept, rows=rows)
    return _hours(work.seconds(wanted, arguments, -(-rows // batch), batch), work.memory(wanted).total)


def tables() -> str:
    """Both tables, with what they take for granted."""
    memory = [
        "model",
        "training",
        "devices",
        "weights",
        "gradients",
        "moments",
        "activations",
        "head tile",
        "whole",
        "in all",
        "fits 80 GB",
    ]
    hours = [
        "model",
        "devices",
        "pairs",
        "reference",
        "scores",
        "oracle, full",
        "policy, full",
        "oracle, LoRA",
        "policy, LoRA",
    ]
    assumed = (
        f"Assumed: a prompt of {PROMPT} tokens with {REPLIES} replies of {REPLY} each; {TOKENS_PER_FORWARD} tokens a pass, {BATCH} pairs an update "
        f"and device; bfloat16 with activation checkpointing; float32 weights and moments where all weights train, unless the table says otherwise; a "
        f"policy on {SELECTED:.0%} of the tokens; one epoch; FSDP2 for the hours. A device sustains {RATES[HALF] / 1e12:.0f} TFLOP/s in bfloat16, 40 % of an "
        f"H100's peak, and sends {LINKS[0] / 1e9:.0f} GB/s inside its machine of {PER_NODE} and {LINKS[1] / 1e9:.0f} GB/s among machines. Neither rate was measured."
    )
    return "\n\n".join(
        [
            assumed,
            "Bytes of a device:",
            _table(memory, memory_rows()),
            "Hours of the stages that compute with a model; in parentheses where it does not fit 80 GB:",
            _table(hours, hour_rows()),
        ]
    )


def _table(columns: Sequence[str], rows: Iterator[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str) -> str:
    """The page with the tables as they are computed now."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> None:
    """Print the tables, or write them."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--write", action="store_true", help="write the tables into the page")
    if made.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
