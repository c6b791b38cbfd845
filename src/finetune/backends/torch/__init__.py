"""Trains with torch and PEFT. Files: backend (open), session (verbs), state (save, load), probe, reload."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from finetune.backends import importing_libraries


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """Within this context a library is not to be had, whether it is installed or not."""
    before = {key: sys.modules[key] for key in (name,) if key in sys.modules}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


def without_bitsandbytes() -> contextlib.AbstractContextManager[None]:
    """Keep PEFT from importing bitsandbytes wherever that is installed.

    It takes 44 MiB and two seconds that only a quantised base is worth, and the layers of that are ours anyway.
    """
    return contextlib.nullcontext() if "bitsandbytes" in sys.modules else without("bitsandbytes")


# Where it has no kernel from the hub, for products that are not used here, it says so whenever it is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
with importing_libraries():
    import transformers.modeling_utils  # noqa: F401 - and with it torch

    with without_bitsandbytes():
        import peft  # noqa: F401
