"""How much data does the oracle need? It trains on 5 to 100 % of the pairs, the policy always on all.

python -m studies.oracle_data --page docs/earlier_studies.md --pictures docs/pictures
"""

from studies.arms import Arm, options
from studies.small import small_outcomes
from studies.tables import publish

BASE = Arm("100 % of the pairs")
FRACTIONS = [0.05, 0.25]
ARMS = [
    *(
        Arm(f"{share:.0%} of the pairs".replace("%", " %"), [f"oracle.fraction={share}"])
        for share in FRACTIONS
    ),
    BASE,
]


def main() -> None:
    """Run the missing arms, then print the table."""
    chosen = options(__doc__).parse_args()
    found = small_outcomes(ARMS, chosen)
    publish(
        "oracle_data",
        found,
        chosen,
        against=BASE.name,
        title="Oracle trained on a part of the pairs: reward against KL",
    )


if __name__ == "__main__":
    main()
