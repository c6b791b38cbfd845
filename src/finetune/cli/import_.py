"""`ft import`: a GGUF file as an ordinary model folder."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import print_examined, say
from finetune.cli.options import AsJson, named_dtype
from finetune.errors import ModelError

Source = Annotated[Path, typer.Argument(metavar="FILE.gguf", help="The GGUF file.")]
Folder = Annotated[
    Path | None, typer.Argument(metavar="OUTPUT", help="The folder to make. Default: here, named as the file.")
]
Stored = Annotated[
    str | None, typer.Option("--dtype", help="float32, float16 or bfloat16. Default: float32, which loses nothing.")
]


def command(file: Source, output: Folder = None, *, dtype: Stored = None, json_output: AsJson = False) -> int:
    """Make a Hugging Face model folder of a GGUF file: weights de-quantised, config, tokenizer, template, model card.

    What was written is read again and held to the file, token ids also to llama.cpp; the folder comes to its place only
    when all of it agrees.
    """
    from finetune.export.import_gguf import import_gguf
    from finetune.files import meant_file

    if not file.exists():
        raise ModelError(f"{file} does not exist", hint=meant_file(file, "name a GGUF file"))
    done = import_gguf(file, output=output, dtype=named_dtype(dtype), tell=say)
    print_examined(done, as_json=json_output)
    return 0
