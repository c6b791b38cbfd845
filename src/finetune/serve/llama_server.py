"""llama.cpp's own server, with the API that OpenAI's clients know, in a process that lives no longer than ours.

The process ends when its standard input is closed, however we end.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune.errors import DeploymentError, install_line
from finetune.export.llama_runtime import get, load_chat, post
from finetune.processes import end_with, python_command
from finetune.serve.messages import Completion

_PAUSE = 0.05
_UNREAD = "does not match the expected"
"""What it says of an answer that is not in the format that it knows of the template, such as gpt-oss's channels."""


@dataclass(frozen=True, slots=True)
class ServerTimeouts:
    """Seconds to wait: until the file is loaded, for anything at all to come of an answer, and for it to end."""

    load: float = 600.0
    silence: float = 300.0
    end: float = 10.0


class LlamaServer:
    """A running server; `llama_server` makes it."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", words: IO[bytes], address: str, patience: ServerTimeouts
    ) -> None:
        self.address = address
        self._process, self._words, self._patience = process, words, patience

    def check(self) -> None:
        """See that the process is still there.

        Raises:
            DeploymentError: it has ended; its last words are quoted.
        """
        if self._process.poll() is not None:
            raise DeploymentError(_ended(self._process, self._words), hint="start it again")

    def wait(self) -> None:
        """Serve until somebody interrupts.

        Raises:
            DeploymentError: the process has ended by itself.
        """
        self._process.wait()
        self.check()

    def ask(self, path: str, asked: Mapping[str, object]) -> dict[str, Any]:
        """What it answers to a request of its API.

        Raises:
            DeploymentError: it refused, did not answer in time, or ended.
        """
        begun = f"llama.cpp's server at {self.address} could not answer {path}"
        try:
            return post(self.address, path, asked, timeout=self._patience.silence)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
            raise DeploymentError(f"{begun}: it says {said}", hint="see what it says") from None
        except TimeoutError:
            raise DeploymentError(
                f"{begun}: nothing came for {self._patience.silence:g} s", hint="see whether the machine is busy"
            ) from None
        except (OSError, ValueError) as error:
            time.sleep(_PAUSE)
            self.check()
            raise DeploymentError(f"{begun}: {error}", hint="start it again") from None

    def rendered_ids(
        self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, object] | None = None
    ) -> tuple[int, ...]:
        """The ids that it computes with, of the prompt that it makes of a conversation and its template's variables.

        Raises:
            DeploymentError: as `ask`.
        """
        prompt = self.ask("apply-template", _conversation(messages, variables))["prompt"]
        return tuple(self.ask("tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"])

    def chat(
        self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, object] | None = None, *, most: int
    ) -> Completion:
        """The likeliest answer to a conversation; it may have so many tokens at most.

        Raises:
            DeploymentError: as `ask`.
        """
        try:
            told = self._complete(_conversation(messages, variables), most=most)
        except DeploymentError as error:
            if _UNREAD not in error.message:
                raise
            asked = {"prompt": list(self.rendered_ids(messages, variables)), "temperature": 0, "n_predict": most}
            told = self.ask("completion", asked)
            return Completion(told["content"], told["stop_type"] != "limit", told["tokens_evaluated"], read=False)
        [choice] = told["choices"]
        ended = choice["finish_reason"] == "stop"
        return Completion(choice["message"]["content"] or "", ended, told["usage"]["prompt_tokens"])

    def chat_ids(self, messages: Sequence[Mapping[str, str]], *, most: int) -> tuple[int, ...]:
        """The ids of the likeliest answer, the one that ends it among them.

        Raises:
            DeploymentError: as `ask`.
        """
        told = self._complete(_conversation(messages), most=most, verbose=True, return_tokens=True)
        # Not those beside `logprobs`: there the server leaves out tokens that end within a character.
        ids, count = tuple(told.get("__verbose", {}).get("tokens", ())), told["usage"]["completion_tokens"]
        if len(ids) != count:
            raise DeploymentError(
                f"llama.cpp's server at {self.address} tells the ids of {len(ids)} of {count} tokens of its answer",
                hint=f"use the xllamacpp of the gguf extra: {install_line('gguf')}",
            )
        return ids

    def _complete(self, asked: Mapping[str, object], *, most: int, **more: object) -> dict[str, Any]:
        return self.ask("v1/chat/completions", {**asked, "temperature": 0, "max_tokens": most, **more})


def _conversation(
    messages: Sequence[Mapping[str, str]], variables: Mapping[str, object] | None = None
) -> dict[str, object]:
    return {"messages": list(messages)} | ({"chat_template_kwargs": dict(variables)} if variables else {})


@contextlib.contextmanager
def llama_server(
    model: Path, *, context: int, name: str, port: int = 0, patience: ServerTimeouts | None = None
) -> Iterator[LlamaServer]:
    """A server of a GGUF file, for this context.

    Args:
        context: how many tokens a conversation may have, its answer included.
        name: what it calls the model.
        port: where it listens; 0 for any that is free.

    Raises:
        DeploymentError: llama.cpp could not load the file or listen there, or took too long; its words are quoted.
    """
    patience = patience or ServerTimeouts()
    request = {"model": str(model), "context": context, "name": name, "port": port}
    with tempfile.TemporaryFile() as words, tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        told = Path(folder) / "address"
        process = subprocess.Popen(
            python_command("-m", "finetune.serve.llama_server", str(told)),
            stdin=subprocess.PIPE,
            stdout=words,
            stderr=words,
            # Ctrl-C is for us; it ends when we do.
            start_new_session=True,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            yield LlamaServer(process, words, _address(process, words, told, patience.load), patience)
        finally:
            _end(process, patience.end)


def _address(process: "subprocess.Popen[bytes]", words: IO[bytes], told: Path, load: float) -> str:
    """Where it listens, once it does."""
    until = time.monotonic() + load
    while not told.exists():
        if process.poll() is not None:
            raise DeploymentError(_ended(process, words), hint="see what it says; ft export writes the file again")
        if time.monotonic() > until:
            raise DeploymentError(
                f"llama.cpp had not loaded the file after {load:g} s", hint="see whether the machine is busy"
            )
        time.sleep(_PAUSE)
    address = told.read_text(encoding="utf-8")
    try:
        well = get(address, "health", timeout=load).get("status") == "ok"
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"llama.cpp's server at {address} does not answer: {error}", hint="start it again"
        ) from None
    if not well:
        raise DeploymentError(f"llama.cpp's server at {address} does not say that it is well", hint="start it again")
    return address


def _end(process: "subprocess.Popen[bytes]", patience: float) -> None:
    """End it, by force where it does not go."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ended(process: "subprocess.Popen[bytes]", words: IO[bytes]) -> str:
    words.seek(0)
    lines = [line for line in words.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = lines[-1][:300] if lines else "without a word"
    return f"llama.cpp's server has ended (code {process.returncode}): {said}"


def main() -> None:
    """Serve what the first line of standard input asks for, and say where, until that input ends."""
    request = json.loads(sys.stdin.readline())
    # Also while the file is loaded; and a request that is being computed must not keep us.
    end_with(sys.stdin.fileno())
    server = load_chat(Path(request["model"]), context=request["context"], port=request["port"], name=request["name"])
    told = Path(sys.argv[1])
    unready = told.with_suffix(".part")
    unready.write_text(server.listening_address, encoding="utf-8")
    unready.replace(told)
    threading.Event().wait()


if __name__ == "__main__":
    main()
