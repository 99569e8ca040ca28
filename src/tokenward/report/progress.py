"""Where a run is that has not ended: a small file beside its page, which the run writes and its page reads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tokenward.artifacts import read_json, write_json
from tokenward.display import Moment

FILE = Path("report") / "progress.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is.

    Attributes:
        stages: The stages that it goes through, in order.
        moment: Where it is.
        stopped: Whether it was stopped or ended with an error.
        at: When this was written. A run that was killed leaves its last file behind.
    """

    stages: Sequence[str]
    moment: Moment
    stopped: bool = False
    at: str = field(default_factory=_now)

    def write(self, folder: Path) -> None:
        """Write it into a run's folder."""
        (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, asdict(self))

    @property
    def place(self) -> str:
        """The stage that runs, and its step, in words."""
        stage, task, done, total, _ = self.moment
        named = f"{stage} ({task})" if task not in ("", stage) else stage
        return f"{named}, step {done} of {total}" if total else named

    @property
    def words(self) -> str:
        """What runs now, what is done and what is to come."""
        stages, stage = list(self.stages), self.moment.stage
        here = stages.index(stage) if stage in stages else 0
        parts = {
            "Done": stages[: here + self.moment.ended],
            "Now": [self.place] if stage and not (self.moment.ended or self.stopped) else [],
            "To come": stages[here + (stage in stages) :],
        }
        return " ".join(f"{name}: {', '.join(part)}." for name, part in parts.items() if part)

    @property
    def time(self) -> str:
        """When it was written, for people."""
        return f"{datetime.fromisoformat(self.at):%Y-%m-%d %H:%M:%S} UTC"


def read_progress(folder: Path) -> Progress | None:
    """What a run that has not ended left in its folder; None if it ended or never ran."""
    path = folder / FILE
    if not path.is_file():
        return None
    value = read_json(path)
    return Progress(**{**value, "moment": Moment(*value["moment"])})


def remove_progress(folder: Path) -> None:
    """Say that a run has ended."""
    (folder / FILE).unlink(missing_ok=True)
