"""The training and scoring claims on a CUDA device in bfloat16: claims ``gpu_*``. Without a device, nothing runs."""

from dataclasses import replace

import torch

from benchmarks import scoring
from benchmarks.options import parser, prepared
from benchmarks.results import report
from benchmarks.training import measure


def main() -> None:
    """Measure and report, or print that there is no CUDA device."""
    options = parser(__doc__, repetitions=14).parse_args()
    if not torch.cuda.is_available():
        print("gpu_step was not run: torch sees no CUDA device. No result was written.")
        return
    with prepared(options) as found:
        steps = measure(found, "bfloat16", suffix="bf16", device="cuda")
        found.repetitions = min(found.repetitions, 5)
        passes = scoring.measure(found, device="cuda")
    # The targets are for two CPU cores; on a GPU the comparisons are only reported.
    report([replace(item, claim=f"gpu_{item.claim}", target="reported") for item in [*steps, *passes]])


if __name__ == "__main__":
    main()
