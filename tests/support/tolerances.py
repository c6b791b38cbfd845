"""How near two backends' numbers are: float32 next to float64, each in its own order of sums."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def check_gradients(found: Mapping[str, Any], exact: Mapping[str, Any], tolerance: float = 1e-4) -> None:
    """Each gradient is the exact one to a ten-thousandth of its own length.

    Where an exact gradient is nothing next to the others, as those of queries are that see one token only, all that
    is left in float32 is the rounding of what cancels: a millionth of all gradients together is let pass.
    """
    assert found.keys() == exact.keys()
    everything = float(np.sqrt(sum(float((slope**2).sum()) for slope in exact.values())))
    off = {
        name: float(np.linalg.norm(found[name] - slope))
        for name, slope in exact.items()
        if np.linalg.norm(found[name] - slope) > tolerance * np.linalg.norm(slope) + 1e-6 * everything
    }
    assert off == {}
