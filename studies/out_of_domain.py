"""Does an oracle help outside its data? One trained on HH selects tokens of the built-in pairs.

    python -m studies.out_of_domain --page docs/earlier_studies.md --pictures docs/pictures

The HH oracle learned which replies people find harmless; here it selects tokens for a preference for positive sentiment
(VADER). The policy, its pairs and its updates are the same. Random tokens are the control.
"""

from studies.arms import Arm, options
from studies.selection import ARMS as SELECTIONS
from studies.small import small_model, small_outcomes
from studies.tables import publish
from tokenward.stages.lists import run_through
from tokenward.tools.run import open_run

ORACLE_RECIPE = "recipes/studies/hh_oracle.yaml"
OWN, RANDOM = Arm("oracle of the built-in pairs"), SELECTIONS[1]


def main() -> None:
    """Run the missing arms, then print the table."""
    chosen = options(__doc__).parse_args()

    def folder(seed: int) -> str:
        return f"{chosen.runs}/hh_oracle-{seed}"

    def train(seed: int) -> None:
        start = small_model(chosen.runs).folder
        own = [f"run={folder(seed)}", f"seed={seed}", f"model.name={start}"]
        run_through(open_run(ORACLE_RECIPE, own, quiet=True), "oracle")

    def changes(seed: int) -> list[str]:
        scorer = "{name: log_ratio, numerator: elsewhere, denominator: reference}"
        return [f"auxiliary_models.elsewhere.model={folder(seed)}/oracle/model", f"scores.scorer={scorer}"]

    found = small_outcomes([OWN, Arm("oracle of HH", changes, before=train), RANDOM], chosen)
    publish(
        "out_of_domain", found, chosen, against=OWN.name, title="An oracle of other data: reward against KL"
    )


if __name__ == "__main__":
    main()
