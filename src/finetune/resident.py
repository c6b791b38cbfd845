"""How much of the machine's memory this process and its children have held."""

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CONTROL = Path("/proc/self/clear_refs")


def peak_rss() -> int | None:
    """The highest resident set of this process so far, in bytes; None where the system does not tell.

    On Linux `getrusage` will not do: what it tells of a process begins with the peak of the one that started it.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return _most_resident("RUSAGE_SELF")


def largest_child() -> int | None:
    """The highest resident set of any one child, or child of a child, that has been waited for, in bytes.

    0 where there was none, None where the system does not tell. On Linux it is no less than what this process held
    when it started the child: together with `peak_rss` the larger of both is right.
    """
    return _most_resident("RUSAGE_CHILDREN")


def _most_resident(whose: str) -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak: int = resource.getrusage(getattr(resource, whose)).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak() -> None:
    """Forget the peak so far (imports reach high); only Linux can."""
    if _CONTROL.exists():
        _CONTROL.write_text("5")
