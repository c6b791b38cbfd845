"""Our own way to Ollama as a subject."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import FineTuneError
from finetune.serve.ollama import Ollama, OllamaRecipe, OllamaTimeouts, full_name
from finetune.serve.publish import Blob, check_free, place_model
from finetune.verify.stateful.lives import Ending

_CONTEXT = 64
_MOST = 8


@dataclass(frozen=True, slots=True)
class Serving:
    """What is to be served: a GGUF file, the template of its server's kind, and where answers stop."""

    file: Path
    template: str
    stops: tuple[str, ...]


class OursOnOllama:
    """What `ft deploy --to ollama` does once it has a file; a subject that deploys.

    Args:
        host: where the server answers.
        patience: how long it waits.
    """

    name = "finetune with Ollama"

    def __init__(self, host: str, patience: OllamaTimeouts) -> None:
        self._server = Ollama(host, patience=patience)

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def deploy(self, name: str, serving: Serving, *, replace: bool = False) -> Ending:
        """Upload, create, ask once, and name."""
        server, whole = self._server, full_name(name)

        def act() -> str:
            check_free(server, whole, replace=replace)
            blob = Blob(serving.file.name, server.upload(serving.file))
            recipe = OllamaRecipe(serving.template, {"num_ctx": _CONTEXT, "stop": list(serving.stops)})
            return place_model(server, whole, blob, recipe, verify=lambda first: self._said(first, "?"))

        return _ending(act)

    def answer(self, name: str, question: str) -> Ending:
        """Ask once."""
        return _ending(lambda: self._said(full_name(name), question))

    def remove(self, name: str) -> Ending:
        """Delete it."""

        def act() -> str:
            self._server.delete(full_name(name))
            return ""

        return _ending(act)

    def served(self) -> Mapping[str, str]:
        """What the server lists."""
        return self._server.listed()

    def _said(self, name: str, question: str) -> str:
        return self._server.chat(name, [{"role": "user", "content": question}], most=_MOST).text


def _ending(act: Callable[[], str]) -> Ending:
    try:
        return Ending(0, act(), "", None)
    except FineTuneError as error:
        return Ending(error.exit_code, "", str(error), None)
