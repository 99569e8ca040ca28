"""Compare all methods on the same pairs with the same number of updates: reward, KL to the start, time and memory.

    python -m studies.methods --page docs/earlier_studies.md --pictures docs/pictures

Each arm is the recipe that ``tokenward init`` writes, with the study's model, data and training. Three methods are left out: ``cft``
needs a verifier of answers, and ``rto`` and ``tlm_rl`` train on the policy's own replies, which :mod:`studies.frontier` compares.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from studies.arms import Arm, Outcome, options
from studies.peak import peak_bytes
from studies.small import small_outcomes
from studies.tables import arms_of, publish
from tokenward.methods import Method, all_methods

AGAINST = "dpo"
LEFT_OUT = ("cft", "rto", "tlm_rl")
WRITTEN = {
    "LOW": "-0.5",  # the paper's bounds are not known; these are the study's
    "HIGH": "1.5",
    "utility": "good",  # the same name for the same training, so that all arms share it
    "degraded": "bad",
    "learning_rate: 1.0e-5, num_train_epochs: 2": "learning_rate: 8.0e-5, num_train_epochs: 1",  # as for the oracle
}
"""Replacements in the text of a method's recipe."""
MORE = {"tlm": ["reward.training={max_steps: 18, per_device_train_batch_size: 8, learning_rate: 5.0e-5}"]}
"""Further changes of an arm: the reward makes as many updates as the oracle."""
PLAIN = Arm("sft", ["policy.selection={name: all}", "policy.objective={name: weighted_likelihood}"])
"""Baseline for the methods that train on the likelihood of chosen tokens."""


def arm_of(method: Method) -> Arm:
    """A method's recipe as changes to the study's recipe."""
    text = method.body
    for old, new in WRITTEN.items():
        text = text.replace(old, new)
    body: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return Arm(
        method.name,
        [
            *MORE.get(method.name, []),
            *(
                f"{table}.{key}={json.dumps(value)}"
                for table, keys in body.items()
                for key, value in keys.items()
                if key != "training"  # policy and oracle are trained with the study's settings
            ),
        ],
    )


def costs(found: Sequence[Outcome], values: Path) -> list[str]:
    """CPU seconds per step (median and range over seeds), and peak memory of training with the first seed."""
    lines = ["| method | CPU seconds per step | peak memory, GB |", "|---|---|---|"]
    for name in arms_of(found)[1:]:
        mine = [item for item in found if item.arm == name]
        seconds = [item.facts["cpu_seconds"] / item.facts["steps"] for item in mine]
        spread = f"{np.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"
        lines.append(f"| {name} | {spread} | {peak_bytes(values, mine[0]) / 1e9:.2f} |")
    return lines


ARMS = [PLAIN, *(arm_of(method) for name, method in all_methods().items() if name not in LEFT_OUT)]


def main() -> None:
    """Run the missing arms, then print the table."""
    made = options(__doc__)
    made.add_argument("--only", nargs="+", help="names of methods; dpo is always included")
    chosen = made.parse_args()
    arms = [arm for arm in ARMS if not chosen.only or arm.name in (AGAINST, *chosen.only)]
    found = small_outcomes(arms, chosen)
    publish(
        "methods",
        found,
        chosen,
        against=AGAINST,
        title="Methods at 8 updates: reward against KL",
        more={"Cost of a step of 4 pairs": costs(found, chosen.values)},
    )


if __name__ == "__main__":
    main()
