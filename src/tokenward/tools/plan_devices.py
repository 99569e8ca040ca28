"""What each of several devices would need for a recipe, computed from sizes: nothing here is measured."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tokenward.data.fields import unknown_name
from tokenward.errors import UserError
from tokenward.ops import costs
from tokenward.ops.costs import FLOAT, HALF, ModelSizes, NumberTypes, Work
from tokenward.ops.sharding import (
    ENGINES,
    DeviceMemory,
    Devices,
    Engine,
    scoring_bytes,
    sent_bytes,
    training_bytes,
    training_seconds,
)
from tokenward.tools.plan_words import size
from tokenward.training.arguments import TokenTrainingArguments

RATES = {HALF: 400e12, FLOAT: 50e12}
"""Assumed operations per second of a device by bytes of a number: an H100 at 40 % of its 989e12 and 75 % of its 67e12."""

PER_NODE, LINKS = 8, (300e9, 50e9)
"""Devices of a node, and assumed bytes per second that one sends inside its node and to other nodes."""

MOST_DEVICES = 4096

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GB|GiB|MB|MiB|)\s*", re.IGNORECASE)
_UNITS = {"gb": 1e9, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20, "": 1.0}


class Wanted(NamedTuple):
    """The devices that a user asks for. None is the recipe's engine, or an assumed speed."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple's own is of no use here
    memory: float | None = None
    engine: Engine | None = None
    rate: float | None = None
    link: float | None = None

    def devices(self, types: NumberTypes, table: Mapping[str, Any]) -> Devices:
        """The devices for numbers of some types, with the engine of a ``training`` table."""
        rate = RATES[types.products] if self.rate is None else self.rate
        link = LINKS[self.count > PER_NODE] if self.link is None else self.link
        return Devices(self.count, self.engine or engine_of(table), self.memory or float("inf"), rate, link)


def wanted(
    count: int | None,
    memory: str | None,
    engine: str | None,
    rate: float | None = None,
    link: float | None = None,
) -> Wanted | None:
    """The devices as the command line names them; None if it names none.

    Args:
        count: Number of devices.
        memory: Memory of each, such as ``80GB``.
        engine: A name of :data:`tokenward.ops.sharding.ENGINES`.
        rate: Teraflops per second that a device sustains.
        link: Gigabytes per second that a device sends.

    Raises:
        UserError: a value is out of range, or has no number of devices that it could belong to.
    """
    others = {"--device-memory": memory, "--engine": engine, "--device-rate": rate, "--link": link}
    if count is None:
        if given := [name for name, value in others.items() if value is not None]:
            raise UserError(
                f"{given[0]} is of several devices, and --devices does not say how many. Write --devices 8 too.",
                code="missing-setting",
            )
        return None
    if not 1 <= count <= MOST_DEVICES:
        raise UserError(
            f"--devices must be from 1 to {MOST_DEVICES}, got {count}. Write --devices 8 for eight.",
            code="out-of-range",
        )
    if engine is not None and engine not in ENGINES:
        raise unknown_name(engine, "an engine", ENGINES, key="")
    for name, value in (("--device-rate", rate), ("--link", link)):
        if value is not None and not value > 0:
            raise UserError(
                f"{name} must be positive, got {value}. Leave it out to assume one.", code="out-of-range"
            )
    return Wanted(
        count,
        None if memory is None else bytes_of(memory),
        engine,  # type: ignore[arg-type]  # checked above
        None if rate is None else 1e12 * rate,
        None if link is None else 1e9 * link,
    )


def bytes_of(text: str) -> float:
    """Bytes of a size such as ``80GB``.

    Raises:
        UserError: it is none, or 0.
    """
    found = _SIZE.fullmatch(text)
    count = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not count:
        raise UserError(
            f"--device-memory must be a size, got {text!r}. Write 80GB, 24GiB or 40000MB.", code="bad-size"
        )
    return count


def engine_of(table: Mapping[str, Any]) -> Engine:
    """The engine of a ``training`` table; DDP if it names none, as a launcher starts."""
    deepspeed = table.get("deepspeed")
    if deepspeed is not None:
        stage = (
            deepspeed.get("zero_optimization", {}).get("stage") if isinstance(deepspeed, Mapping) else None
        )
        return "zero2" if stage in (1, 2) else "zero3"
    return "fsdp2" if table.get("fsdp") else "ddp"


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """A training stage as sizes, from which its memory and time on any devices follow.

    Attributes:
        key: Dotted key of its table in the recipe.
        table: Its ``training`` table.
        sizes: Sizes of its model.
        lora: The same with an adapter.
        types: Bytes per number.
        largest: The largest pass for a number of tokens per pass.
        mean: Work of the mean row.
        rows: Number of rows.
        budget: Tokens per pass.
        checkpointing: Whether only the inputs of layers are saved.
        reference: Whether a frozen reference is in memory too, beside full weights.
    """

    key: str
    table: dict[str, Any]
    sizes: ModelSizes
    lora: ModelSizes
    types: NumberTypes
    largest: Callable[[int], Work]
    mean: Work
    rows: int
    budget: int
    checkpointing: bool
    reference: bool

    def memory(self, devices: Wanted) -> DeviceMemory:
        """Bytes of a device."""
        return training_bytes(
            self.sizes,
            self.largest(self.budget),
            self.types,
            devices.devices(self.types, self.table),
            checkpointing=self.checkpointing,
            reference=self.reference,
        )

    def seconds(self, wanted: Wanted, arguments: TokenTrainingArguments, updates: int, batch: int) -> float:
        """Time of a number of updates of ``batch`` rows on all devices together."""
        devices = wanted.devices(self.types, self.table)
        operations = costs.training_operations(
            self.sizes, self.mean.times(batch), checkpointing=self.checkpointing
        )
        # A device goes through its part of an update in at least one pass per accumulated batch.
        own = batch / devices.count
        passes = max(self.mean.tokens * own / self.budget, arguments.gradient_accumulation_steps)
        sent = sent_bytes(self.sizes, self.types, devices, passes=updates * passes, updates=updates)
        return training_seconds(updates * operations, sent, devices)

    def smaller(self) -> list[tuple[str, "TrainingWork"]]:
        """Settings that lower the memory, with the stage that they make of this one; from harmless to costly."""
        training = f"--set {self.key}.training"
        halves = replace(self, types=self.types._replace(products=HALF))
        found = [
            (f"{training}.bf16=true", halves),
            (f"{training}.activation_checkpointing=true", replace(self, checkpointing=True)),
            (f"{training}.tokens_per_forward={self.budget // 2}", replace(self, budget=self.budget // 2)),
            ("--set model.dtype=bfloat16", replace(self, types=NumberTypes(HALF, HALF))),
            (
                "--set 'model.adapter={r: 16, lora_alpha: 32, target_modules: all-linear}'",
                replace(self, sizes=self.lora, reference=False),
            ),
        ]
        return [(text, made) for text, made in found if made != self]


@dataclass(frozen=True, kw_only=True)
class ScoringWork:
    """A scoring stage as sizes. Each device has a whole model, and the devices share the rows."""

    sizes: ModelSizes
    types: NumberTypes
    largest: Work
    operations: float

    def memory(self) -> DeviceMemory:
        """Bytes of a device."""
        return scoring_bytes(self.sizes, self.largest, self.types)

    def seconds(self, wanted: Wanted) -> float:
        """Time on all devices together."""
        return training_seconds(self.operations, 0.0, wanted.devices(self.types, {}))


class DevicePlan(NamedTuple):
    """What a stage needs of each device. ``advice`` is what to write if it does not fit."""

    stage: str
    memory: DeviceMemory
    seconds: float
    advice: str = ""


def fitting(work: TrainingWork, wanted: Wanted) -> str:
    """What to write so that a training fits; empty if it does."""
    limit = wanted.memory or float("inf")
    if work.memory(wanted).total <= limit:
        return ""
    changed, written = work, list[str]()
    if wanted.devices(work.types, work.table).engine == "ddp" and wanted.count > 1:
        wanted, written = wanted._replace(engine="fsdp2"), ["--engine fsdp2"]
    while changed.memory(wanted).total > limit:
        here = changed.memory(wanted).total
        better = [(text, made) for text, made in changed.smaller() if made.memory(wanted).total < here]
        fits = [(text, made) for text, made in better if made.memory(wanted).total <= limit]
        if not better or len(written) > _MOST_CHANGES:
            break
        text, changed = (fits or better)[0]
        written.append(text)
    held = changed.memory(wanted).total
    if held <= limit:
        return f"does not fit. Write {' '.join(written)}: {size(held)}"
    more = _enough(changed, wanted)
    return f"does not fit, not even with {' '.join(written)} ({size(held)}). " + (
        f"Write --devices {more} too" if more else "Use a smaller model"
    )


_MOST_CHANGES = 12


def _enough(work: TrainingWork, wanted: Wanted) -> int | None:
    """The smallest number of devices, in doublings, on which a training fits."""
    count = wanted.count
    while count <= MOST_DEVICES:
        tried = wanted._replace(count=count, engine="fsdp2")
        if work.memory(tried).total <= (wanted.memory or float("inf")):
            return count
        count *= 2
    return None


def device_plans(
    trainings: Mapping[str, TrainingWork],
    scorings: Mapping[str, ScoringWork],
    courses: Mapping[str, tuple[TokenTrainingArguments, int, int]],
    wanted: Wanted,
    order: Sequence[str],
) -> list[DevicePlan]:
    """The plans of the stages that compute with a model, in an order; ``courses`` has updates and rows per update."""
    found: list[DevicePlan] = []
    for stage in order:
        if stage in trainings:
            work = trainings[stage]
            seconds = work.seconds(wanted, *courses[stage])
            found.append(DevicePlan(stage, work.memory(wanted), seconds, fitting(work, wanted)))
        elif stage in scorings:
            work = scorings[stage]
            memory = work.memory()
            advice = (
                ""
                if memory.total <= (wanted.memory or float("inf"))
                else "does not fit: each device holds the whole model while it scores. Write --set model.dtype=bfloat16, or "
                "--set scores.tokens_per_batch to a smaller number, or use devices with more memory"
            )
            found.append(DevicePlan(stage, memory, work.seconds(wanted), advice))
    return found
