"""Warnings and counts of dropped rows, which a script sees whether or not it shows progress bars."""

import logging

from tokenward.display import Display

LOGGER = logging.getLogger("tokenward")

_WARNING = "warning"


class LoggedDisplay(Display):
    """A display whose warnings go to the logger ``tokenward``.

    Args:
        quiet: Show no progress.
        log: Log warnings; False in all processes but one.
    """

    def __init__(self, *, quiet: bool = False, log: bool = True) -> None:
        super().__init__(quiet=quiet)
        self._quiet, self._log = quiet, log

    def line(self, text: str) -> None:
        """Show a line, or log it if it is a warning."""
        if text.strip().startswith(_WARNING):
            self._warn(text)
        else:
            super().line(text)

    def notice(self, text: str) -> None:
        """Show a line about dropped rows; without progress bars it is logged."""
        if self._quiet:
            self._warn(text)
        else:
            self.line(text)

    def _warn(self, text: str) -> None:
        if self._log:
            LOGGER.warning(text.strip().removeprefix(_WARNING).lstrip(":, "))
