"""`ft export`: a fine-tuned model as a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import print_examined, say
from finetune.cli.options import AsJson, named_outtype, with_base
from finetune.errors import ModelError, OutputError

Source = Annotated[str, typer.Argument(metavar="RUN", help="A run; or a model: shipped name, folder, hub id.")]
Out = Annotated[
    str | None,
    typer.Option("--outtype", help="f32, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m. Default: f16; f32 for an adapter."),
]
AdapterOnly = Annotated[bool, typer.Option("--adapter-only", help="The adapter alone, for llama.cpp's --lora.")]
File = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="The file to make. Default: below the run's folder.")
]
BackendName = Annotated[str, typer.Option("--backend", help="Computes the baseline of a model that is not an ft run.")]


def command(
    run: Source,
    *,
    outtype: Out = None,
    adapter_only: AdapterOnly = False,
    output: File = None,
    backend: BackendName = "torch",
    json_output: AsJson = False,
) -> int:
    """Write a run's result, adapter merged in, as GGUF, and hold it to the trainer through llama.cpp.

    Tokens, logits and greedy text are compared; the file comes to its place only when all of them agree.
    """
    from finetune.export.gguf import export

    chosen = named_outtype(outtype) if outtype is not None else None
    try:
        done = export(_named(run), outtype=chosen, adapter_only=adapter_only, output=output, backend=backend, tell=say)
    except ModelError as error:
        raise ModelError(error.message, hint=_near_run(run) or error.hint) from None
    print_examined(done, as_json=json_output)
    return 0


def _named(source: str) -> str:
    """The run that is named, however it is; else the name of a model."""
    from finetune.files import is_run
    from finetune.models.locate import SHIPPED
    from finetune.run.find import find_run

    if source in SHIPPED:
        return source
    try:
        found = find_run(source)
    except OutputError:
        return source
    return str(with_base(found)) if is_run(found) else source


def _near_run(source: str) -> str:
    """The run that was meant by a name that neither a run nor a model has."""
    from finetune.run.find import find_run

    if Path(source).exists():
        return ""
    try:
        find_run(source)
    except OutputError as error:
        return error.hint if "did you mean" in error.hint else ""
    return ""
