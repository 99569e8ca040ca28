"""What share of the tokens should be selected? Varies the share of the chosen and of the rejected replies separately.

python -m studies.rates --page docs/earlier_studies.md --pictures docs/pictures
"""

from studies.arms import Arm, options
from studies.small import small_outcomes
from studies.tables import publish

BASE = Arm("30 % / 30 %")
RATES = [0.1, 1.0]


def rates(chosen: float, rejected: float) -> Arm:
    """An arm of the study, with changes for the sides that are not 30 %."""
    changes = {"chosen": chosen, "rejected": rejected}
    return Arm(
        f"{chosen:.0%} / {rejected:.0%}".replace("%", " %"),
        [f"policy.selection.{side}.fraction={rate}" for side, rate in changes.items() if rate != 0.3],
    )


ARMS = [BASE, *(rates(rate, 0.3) for rate in RATES), *(rates(0.3, rate) for rate in RATES)]


def main() -> None:
    """Run the missing arms, then print the table."""
    chosen = options(__doc__).parse_args()
    found = small_outcomes(ARMS, chosen)
    publish(
        "rates",
        found,
        chosen,
        against=BASE.name,
        title="Selection rates, chosen / rejected: reward against KL",
    )


if __name__ == "__main__":
    main()
