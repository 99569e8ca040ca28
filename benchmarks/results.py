"""Results of claims: their files, their printed table, and the machine and versions."""

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
    """Result of one claim.

    Attributes:
        claim: Name of the claim and of its file.
        target: The claim, such as ``>= 4.0``.
        ratio: The measured number.
        low: Lower end of its 95 % interval.
        high: Upper end; equal to ``low`` if the number was counted rather than timed.
        ours: Raw measurements of tokenward.
        peer: Raw measurements of the other side.
        repetitions: Number of measurements of both sides.
        predicted: Prediction of ``benchmarks.model``, or None.
        settings: All relevant settings of both sides.
        quick: Whether this was a trial on a tiny model, whose numbers mean nothing.
        machine: The machine.
        versions: Versions of the packages.
        command: The command that made it.
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
        """Whether the ratio meets the target."""
        return holds(self.target, self.ratio)


def holds(target: str, value: float) -> bool:
    """Whether a value meets a target such as ``>= 4.0`` or ``<= 1.15``; always True for ``reported``."""
    relation, _, bound = target.partition(" ")
    if relation == "reported":
        return True
    if relation == ">=":
        return value >= float(bound)
    if relation == "<=":
        return value <= float(bound)
    raise ValueError(f"a target is >= or <= and a number, or reported, got {target!r}")


def write(result: Result, folder: Path | None = None) -> Path:
    """Write a result and return its path. Trials go into a separate folder, which is never rendered."""
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
    """Versions of the installed packages that are measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU, its cores and instruction sets, and memory; nothing that identifies the machine."""
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
    """The command of this process, to be run in the repository's root."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
