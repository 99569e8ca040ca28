"""Can a weak oracle supervise a strong policy? Compares a third of the default model with the whole model as oracle.

    python -m studies.weak_to_strong --page docs/earlier_studies.md --pictures docs/pictures

The small model has every third layer and is fine-tuned on the preferred replies for a few epochs. It is then oracle and
reference, and the whole default model is the policy. The control, at the same cost, selects random tokens.
"""

from studies.arms import Arm, options, outcomes
from studies.selection import ARMS as SELECTIONS
from studies.selection import RECIPE
from studies.small import weak_model
from studies.tables import publish

SELF, RANDOM = Arm("whole model as oracle"), Arm("random 30 %", SELECTIONS[1].changes)


def main() -> None:
    """Run the missing arms, then print the table."""
    chosen = options(__doc__).parse_args()
    weak = Arm(
        "a third of it as oracle",
        lambda seed: [f"oracle.model={weak_model(chosen.runs, seed).folder}"],
        before=lambda seed: weak_model(chosen.runs, seed).make(),
    )
    found = outcomes(RECIPE, [SELF, weak, RANDOM], chosen)
    publish("weak_to_strong", found, chosen, against=SELF.name, title="A smaller oracle: reward against KL")


if __name__ == "__main__":
    main()
