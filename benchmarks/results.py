"""A claim's result: its file, its line on the screen, and what it was measured with."""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("tokenward", "torch", "transformers", "accelerate", "trl", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one claim's script found.

    Attributes:
        claim: Name of the claim and of its file.
        target: What is claimed, such as ``>= 4.0``.
        ratio: The number that the target is about.
        low: Lower end of its 95 % interval.
        high: Upper end; equal to ``low`` where it was counted rather than timed.
        ours: Raw measurements of tokenward.
        peer: Raw measurements of what it is compared with.
        repetitions: How many times both were measured.
        predicted: The same number by the model of ``benchmarks.model``, or None where it predicts nothing.
        settings: Everything of both sides that could matter.
        quick: Whether it was a trial on a tiny model, which says nothing.
        machine: Where it ran.
        versions: Of the packages.
        command: That made it.
    """

    claim: str
    target: str
    ratio: float
    low: float
    high: float
    ours: Any
    peer: Any
    repetitions: int
    predicted: float | None
    settings: dict[str, Any]
    quick: bool = False
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: versions())
    command: str = field(default_factory=lambda: command())

    @property
    def met(self) -> bool:
        """Whether the target holds for the ratio that was found."""
        return holds(self.target, self.ratio)


def holds(target: str, value: float) -> bool:
    """Whether a value meets a target such as ``>= 4.0`` or ``<= 1.15``; ``reported`` asks nothing."""
    relation, _, bound = target.partition(" ")
    if relation == "reported":
        return True
    if relation == ">=":
        return value >= float(bound)
    if relation == "<=":
        return value <= float(bound)
    raise ValueError(f"a target is >= or <= and a number, or reported, got {target!r}")


def write(result: Result, folder: Path | None = None) -> Path:
    """Write a result and say where; a trial goes into a folder of its own, which is never rendered."""
    folder = folder or (FOLDER / "quick" if result.quick else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.claim}.json"
    path.write_text(json.dumps(asdict(result), indent=1, sort_keys=True) + "\n")
    return path


def report(results: Sequence[Result]) -> None:
    """Write results and print them as a table."""
    table = Table(Column("claim", no_wrap=True), "target", "measured", "95 % interval", "predicted", "met")
    for result in results:
        write(result)
        interval = f"{result.low:.3f} to {result.high:.3f}"
        predicted = "" if result.predicted is None else f"{result.predicted:.3f}"
        met = (
            "trial" if result.quick else "" if result.target == "reported" else "yes" if result.met else "no"
        )
        table.add_row(result.claim, result.target, f"{result.ratio:.3f}", interval, predicted, met)
    Console().print(table)


def versions() -> dict[str, str]:
    """Versions of the packages that take part, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, its cores and instruction sets, and memory; nothing that names the machine itself."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = fields.get("flags", "").split()
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return {
        "processor": fields.get("model name", platform.processor()),
        "cores": info.count("processor\t") or None,
        "instructions": [name for name in known if name in flags],
        "memory_gib": round(int(memory["MemTotal"].split()[0]) / 2**20, 1),
        "system": platform.system(),
    }


def command() -> str:
    """How this process was called, as it can be called from the repository's root."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
