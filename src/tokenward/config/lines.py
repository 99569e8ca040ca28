"""Where the keys of a recipe were written."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lines:
    """Where each key of a recipe was written, for error messages."""

    name: str
    numbers: Mapping[str, int] = field(default_factory=dict)
    overridden: tuple[str, ...] = ()

    def line_of(self, key: str) -> int | None:
        """The line of a dotted key in the file; None if it is not written there."""
        return self.numbers.get(key)

    def origin(self, key: str) -> str:
        """Where the value of a dotted key comes from: ``default``, ``file:line`` or ``--set``."""
        if self._override(key) is not None:
            return "--set"
        line = self.line_of(key)
        return "default" if line is None else f"{self.name}:{line}"

    def where(self, key: str) -> str:
        """The place of a dotted key for a message: its own, or that of the enclosing table."""
        override = self._override(key)
        if override is not None:
            return f"--set {override}"
        # A problem with a table may come from the file or from any override inside the table.
        inside = dict.fromkeys(o for o in self.overridden if o.startswith(f"{key}."))
        changes = " and ".join(f"--set {o}" for o in inside)
        if changes and self.line_of(key) is None:
            return changes
        while key and self.line_of(key) is None:
            key = key.rpartition(".")[0]
        place = f"{self.name}:{self.line_of(key)}" if key else self.name
        return f"{place} with {changes}" if changes else place

    def _override(self, key: str) -> str | None:
        covering = (o for o in reversed(self.overridden) if key == o or key.startswith(f"{o}."))
        return next(covering, None)
