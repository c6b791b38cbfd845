"""Writes models as GGUF, once for each line of JSON on standard input; prints how long each took, in seconds, and the
most memory that the process held.

What `ft export` does beyond it, holding the file to what the trainer computes, the peer does not do.
"""

import json
import sys
import time
from pathlib import Path

from job import peak_rss

from finetune.backends import open_backend
from finetune.export.gguf import plan_whole
from finetune.export.gguf_source import exportable_model
from finetune.export.write import write_gguf


def convert(request: dict[str, str]) -> float:
    """Convert one model; the seconds that it took."""
    started = time.perf_counter()
    made = exportable_model(request["model"], open_backend("reference"))
    write_gguf(plan_whole(made, request["outtype"]), Path(request["file"]))
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps({"seconds": [convert(json.loads(line)) for line in sys.stdin], "peak_rss": peak_rss()}))
