"""SePO's and the oracle's optimizer step against TRL's: claims ``sepo_step_*``, ``oracle_step_*`` and their memory."""

from benchmarks.options import parser, prepared
from benchmarks.results import report
from benchmarks.training import measure

NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, repetitions=14)
    options.add_argument(
        "--precision", choices=NAMES, default="fp32", help="float32, or autocast to bfloat16"
    )
    with prepared(options.parse_args()) as found:
        report(measure(found, NAMES[found.precision], suffix=found.precision))


if __name__ == "__main__":
    main()
