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
        message = text.strip()
        if not message.startswith(_WARNING):
            super().line(text)
        elif self._log:
            LOGGER.warning(message.removeprefix(_WARNING).lstrip(":, "))

    def notice(self, text: str) -> None:
        """Show a line about dropped rows; without progress bars it is logged."""
        if self._quiet and not text.strip().startswith(_WARNING):
            text = f"{_WARNING}: {text.strip()}"
        self.line(text)
