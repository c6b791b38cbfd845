"""`ft merge`: a fine-tuned model as an ordinary model folder."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import print_examined, say
from finetune.cli.options import AsJson, RunPath, named_dtype

Folder = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="The folder to make. Default: merged below the run's.")
]
Stored = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16. Default: as the base.")]


def command(run: RunPath, *, output: Folder = None, dtype: Stored = None, json_output: AsJson = False) -> int:
    """Fold a run's adapter into its base: a Hugging Face model folder, held to the trainer in a fresh process.

    Weights, answers and log probabilities are compared; the folder comes to its place only when all of them agree.
    """
    from finetune.export.merge import merge

    done = merge(run, output=output, dtype=named_dtype(dtype), tell=say)
    print_examined(done, as_json=json_output)
    return 0
