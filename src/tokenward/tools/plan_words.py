"""Bytes and seconds in words, for plans."""


def size(count: float | None) -> str:
    """Bytes in a readable form, such as ``1.4 GB``, in powers of 1000; ``-`` for None."""
    if count is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def clock(seconds: float | None) -> str:
    """Seconds in a readable form: ``12 s``, ``3 min``, ``1.5 h``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
