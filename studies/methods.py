"""All methods on the same pairs with the same updates: reward, KL to the start, time and memory of a step.

    python -m studies.methods --page docs/results.md --pictures docs/pictures

Each arm is the recipe that ``tokenward init`` writes, with the study's model, data and training in the place of its own.
Methods that need what the data lacks are left out: ``cft`` a verifier of answers, ``rto`` a trainer that is not ours.
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
LEFT_OUT = ("cft", "rto")
WRITTEN = {
    "LOW": "-0.5",  # the paper's bounds are not known; these are what the study takes
    "HIGH": "1.5",
    "utility": "good",  # auxiliary models that are trained alike have one name, and so one training for all arms
    "degraded": "bad",
    "learning_rate: 1.0e-5, num_train_epochs: 2": "learning_rate: 8.0e-5, num_train_epochs: 1",  # as the oracle
}
"""What the study writes in a method's recipe in the place of what stands there."""
MORE = {"tlm": ["reward.training={max_steps: 18, per_device_train_batch_size: 8, learning_rate: 5.0e-5}"]}
"""Further changes of an arm: a reward makes as many updates as an oracle."""
PLAIN = Arm("sft", ["policy.selection={name: all}", "policy.objective={name: weighted_likelihood}"])
"""What the methods that train on the likelihood of chosen tokens are measured by."""


def arm_of(method: Method) -> Arm:
    """A method's recipe as changes to the study's."""
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
                if key != "training"  # of the policy and the oracle: every arm's is the study's
            ),
        ],
    )


def costs(found: Sequence[Outcome], values: Path) -> list[str]:
    """Processor seconds of a step, median and range over the seeds, and the training's peak memory at the first one."""
    lines = ["| method | processor seconds a step | peak memory, GB |", "|---|---|---|"]
    for name in arms_of(found)[1:]:
        mine = [item for item in found if item.arm == name]
        seconds = [item.facts["cpu_seconds"] / item.facts["steps"] for item in mine]
        spread = f"{np.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"
        lines.append(f"| {name} | {spread} | {peak_bytes(values, mine[0]) / 1e9:.2f} |")
    return lines


def main() -> None:
    """Run what is missing, then show the table."""
    made = options(__doc__)
    made.add_argument("--only", nargs="+", help="names of methods; dpo is always there")
    chosen = made.parse_args()
    arms = [PLAIN, *(arm_of(method) for name, method in all_methods().items() if name not in LEFT_OUT)]
    arms = [arm for arm in arms if not chosen.only or arm.name in (AGAINST, *chosen.only)]
    found = small_outcomes(arms, chosen)
    publish(
        "methods",
        found,
        chosen,
        against=AGAINST,
        title="Methods at 8 updates: reward against KL",
        more={"Cost of a step, of 4 pairs": costs(found, chosen.values)},
    )


if __name__ == "__main__":
    main()
