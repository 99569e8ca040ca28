"""A part of a stage whose files several independent jobs write."""

import re
from typing import NamedTuple, Self

from tokenward.distributed import alone, place
from tokenward.errors import UserError

_WRITTEN = re.compile(r"([0-9]+)/([0-9]+)")


class StagePart(NamedTuple):
    """Part ``number`` of ``of``, counted from 1. It has every file whose place modulo ``of`` is ``number - 1``."""

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> Self:
        """The part that is written ``i/N``.

        Raises:
            UserError: it is not written so, or there is no such part.
        """
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise UserError(
                f"part must be written i/N, got {text!r}. Write 1/4 for the first of four parts.",
                code="bad-part",
            )
        number, of = map(int, found.groups())
        if not 1 <= number <= of:
            example = f"1/{of} to {of}/{of}" if of else "1/4 for the first of four parts"
            raise UserError(
                f"there is no part {text}: parts are counted from 1. Write {example}.", code="bad-part"
            )
        return cls(number, of)

    def has(self, place: int) -> bool:
        """Whether the file at a place, counted from 0, belongs to this part."""
        return place % self.of == self.number - 1

    def of_place(self, place: int) -> "StagePart":
        """The part that has the file at a place."""
        return StagePart(place % self.of + 1, self.of)

    @property
    def name(self) -> str:
        """Its name in names of files."""
        return f"part-{self.number}-of-{self.of}"

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def part_of_process(part: StagePart | None = None) -> StagePart | None:
    """The part that this process of a launch writes of what no job of its own writes; None if it writes everything."""
    if part is not None or alone():
        return part
    here = place()
    return StagePart(here.rank + 1, here.count)
