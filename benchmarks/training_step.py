"""Optimizer steps of SePO and the oracle against TRL's: claims ``sepo_step_*``, ``oracle_step_*`` and their memory."""

from benchmarks.options import parser, prepared
from benchmarks.results import report
from benchmarks.training import measure

NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, repetitions=6)
    options.add_argument(
        "--precision", choices=NAMES, default="fp32", help="float32, or autocast to bfloat16"
    )
    options.add_argument(
        "--checkpointing", action="store_true", help="use activation checkpointing on tokenward's side"
    )
    with prepared(options.parse_args()) as found:
        suffix = f"{found.precision}_checkpointing" if found.checkpointing else found.precision
        report(measure(found, NAMES[found.precision], suffix=suffix, checkpointing=found.checkpointing))


if __name__ == "__main__":
    main()
