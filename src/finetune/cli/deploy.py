"""`ft deploy`: a fine-tuned model behind an API, checked against training."""

from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.console import print_examined, say
from finetune.cli.options import AsJson, RunPath, named_outtype
from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.serve.deploy import Deployed
    from finetune.serve.llama_server import LlamaServer

TARGETS = ("ollama", "llama.cpp")
Target = Annotated[str, typer.Option("--to", help="ollama or llama.cpp.")]
Name = Annotated[str | None, typer.Option("--name", help="The model's name in Ollama. Default: made of the run's id.")]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite an Ollama model of that name.")]
Host = Annotated[str | None, typer.Option("--host", help="Where Ollama answers. Default: OLLAMA_HOST.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Where llama.cpp listens; 0: any free port.")]
CheckOnly = Annotated[bool, typer.Option("--check-only", help="End llama.cpp's server once it is verified.")]
Out = Annotated[str, typer.Option("--outtype", help="The file's type, as ft export has them.")]


def command(
    run: RunPath,
    *,
    to: Target,
    name: Name = None,
    replace: Replace = False,
    host: Host = None,
    port: Port = 0,
    check_only: CheckOnly = False,
    outtype: Out = "f16",
    json_output: AsJson = False,
) -> int:
    """Serve a run's result, and verify it there: the same prompts, answers and stops as in training.

    ollama: the model is created, verified, and only then named. llama.cpp: its server runs until Ctrl-C.
    """
    from contextlib import closing

    from finetune.serve.deploy import deploy_llama_cpp, deploy_ollama
    from finetune.serve.ollama import Ollama

    kind = named_outtype(outtype)
    if to == "llama.cpp":

        def serve(deployed: "Deployed", server: "LlamaServer") -> None:
            _tell(deployed, json_output=json_output)
            if not check_only:
                _say_how_to_ask(deployed)
                server.wait()

        deploy_llama_cpp(run, outtype=kind, port=port, tell=say, serve=serve)
    elif to == "ollama":
        with closing(Ollama(host)) as server:
            done = deploy_ollama(run, server=server, name=name, replace=replace, outtype=kind, tell=say)
        _tell(done, json_output=json_output)
        _say_how_to_ask(done)
    else:
        raise UsageError(f"unknown target: --to {to!r}", hint=f"choose from: {', '.join(TARGETS)}")
    return 0


def _tell(deployed: "Deployed", *, json_output: bool) -> None:
    place = deployed.address if deployed.target == "llama.cpp" else deployed.name
    print_examined(deployed, as_json=json_output, place=place)


def _say_how_to_ask(deployed: "Deployed") -> None:
    path = "v1/chat/completions" if deployed.target == "llama.cpp" else "api/chat"
    request = f'{{"model": "{deployed.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    say(f"ask it: curl {deployed.address}/{path} -H 'Content-Type: application/json' -d '{request}'")
