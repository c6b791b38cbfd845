"""A GGUF file for servers, written once a session."""

from functools import cache, partial
from pathlib import Path

from finetune.backends import open_backend
from finetune.export.gguf import write_exportable
from finetune.export.gguf_source import exportable_model
from finetune_strategies.scratch import lasting_folder


@cache
def shipped_gguf() -> Path:
    """A shipped model."""
    path = lasting_folder("served") / "model.gguf"
    write_exportable(exportable_model("reference-llama", partial(open_backend, "reference")), path, "f16")
    return path
