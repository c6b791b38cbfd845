"""Trains with torch and PEFT. Files: backend (open), session (verbs), state (save, load), probe, reload."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from finetune.backends import importing_libraries


@contextlib.contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Keep PEFT from importing bitsandbytes wherever that is installed.

    It takes 44 MiB and two seconds that only a quantised base is worth, and the layers of that are ours anyway.
    """
    # None is what Python takes for a module that is not to be had.
    kept_out = sys.modules.setdefault("bitsandbytes", None) is None  # type: ignore[arg-type]
    try:
        yield
    finally:
        if kept_out:
            del sys.modules["bitsandbytes"]


# Where it has no kernel from the hub, for products that are not used here, it says so whenever it is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
with importing_libraries():
    import transformers.modeling_utils  # noqa: F401 - and with it torch

    with without_bitsandbytes():
        import peft  # noqa: F401
