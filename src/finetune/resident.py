"""How much of the machine's memory this process has held."""

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
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak() -> None:
    """Forget the peak so far (imports reach high); only Linux can."""
    if _CONTROL.exists():
        _CONTROL.write_text("5")
