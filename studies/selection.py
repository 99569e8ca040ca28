"""Do the selected tokens matter? 30 % by score against random and inverse 30 %, all tokens (SimPO) and DPO.

    python -m studies.selection --page docs/earlier_studies.md --pictures docs/pictures

Every arm makes the same number of updates on the same pairs. The reward is VADER, which ranked the replies of the data. It
defines the preference and is not trained, so it does not share the oracle's mistakes.
"""

from studies.arms import Arm, options, outcomes
from studies.tables import publish

RECIPE = "recipes/studies/builtin.yaml"
SELECTED = Arm("selected 30 %")
SIMPO = ["policy.selection={name: all}", "policy.objective={name: simpo, beta: 2.0, gamma: 0.0}"]
DPO = ["policy.selection={name: all}", "policy.objective={name: dpo, beta: 0.1}"]


def directed(chosen: str, rejected: str) -> list[str]:
    """Changes that select 30 % of both sides in other directions."""
    return [f"policy.selection.chosen.direction={chosen}", f"policy.selection.rejected.direction={rejected}"]


FASTER = "policy.training.learning_rate=6.0e-5"
"""Three times the study's learning rate. Few selected tokens move a policy further than many; with this rate, SimPO and DPO
move as far."""

ARMS = [
    SELECTED,
    Arm("random 30 %", directed("random", "random")),
    Arm("inverse 30 %", directed("bottom", "top")),
    Arm("all tokens (SimPO)", SIMPO),
    Arm("DPO", DPO),
    Arm("SimPO, learning rate x 3", [*SIMPO, FASTER]),
    Arm("DPO, learning rate x 3", [*DPO, FASTER]),
]


def main() -> None:
    """Run the missing arms, then print the table."""
    chosen = options(__doc__).parse_args()
    found = outcomes(RECIPE, ARMS, chosen)
    publish(
        "selection",
        found,
        chosen,
        against=SELECTED.name,
        title="Which tokens train: reward against KL, 16 updates",
    )


if __name__ == "__main__":
    main()
