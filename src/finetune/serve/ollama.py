"""Ollama's server through its own client library: every answer in bounded time, every failure told with its remedy.

Source: https://docs.ollama.com/api
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from finetune.errors import DeploymentError, MissingExtraError, UsageError, install_line
from finetune.serve.messages import Completion

if TYPE_CHECKING:
    import httpx

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"(?:(?:[A-Za-z0-9_][A-Za-z0-9_.:-]*/)?[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{_PART}(?::{_PART})?")
_LONGEST_ANSWER = 2**26
START = "start it with `ollama serve`; Ollama is at https://ollama.com/download"


@dataclass(frozen=True, slots=True)
class OllamaTimeouts:
    """Seconds to wait: for a connection, for anything at all to come, and for a whole answer."""

    connect: float = 5.0
    silence: float = 300.0
    whole: float = 3600.0


@dataclass(frozen=True, slots=True)
class OllamaRecipe:
    """What a model is created from, besides its file."""

    template: str
    parameters: Mapping[str, Any]
    licenses: tuple[str, ...] = ()


def full_name(name: str) -> str:
    """A model's name with its tag.

    Raises:
        UsageError: it is none that Ollama takes.
    """
    if not _NAME.fullmatch(name) or len(name) > 350:
        raise UsageError(
            f"{name!r} is no name of a model in Ollama",
            hint="write [host/][namespace/]model[:tag], of letters, digits, '_', '-' and '.', such as facts:f16",
        )
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


class Ollama:
    """A running server, at `host` or where `OLLAMA_HOST` says.

    Raises:
        MissingExtraError: the client library is not installed.
        UsageError: the host is none.
    """

    def __init__(self, host: str | None = None, *, patience: OllamaTimeouts | None = None) -> None:
        if find_spec("ollama") is None:
            raise MissingExtraError("talking to Ollama needs its client library", hint=install_line("ollama"))
        import httpx

        told = host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
        self._patience = patience or OllamaTimeouts()
        times = httpx.Timeout(self._patience.silence, connect=self._patience.connect)
        scheme, named, place = told.partition("://")
        try:
            if named and (scheme.lower() not in ("http", "https") or not place):
                raise ValueError("http:// or https:// and a host make one")
            # The library makes a client of its own, at OLLAMA_HOST, as it is imported.
            import ollama

            transport = _bounded_transport(self._patience.whole)
            self._client = ollama.Client(
                told, timeout=times, transport=transport, trust_env=False, follow_redirects=False
            )
        except (ValueError, httpx.InvalidURL) as error:
            raise UsageError(
                f"{told!r}, of {'--host' if host else 'OLLAMA_HOST'}, is no address: {error}",
                hint="write it as 127.0.0.1:11434",
            ) from None
        # The library asks neither for blobs that are there nor for renderings alone.
        self._http: httpx.Client = self._client._client
        self.address = str(self._http.base_url).rstrip("/")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def version(self) -> str:
        """The server's version.

        Raises:
            DeploymentError: no Ollama answers there.
        """
        with self._talking("tell its version"):
            return str(self._http.get("/api/version").raise_for_status().json()["version"])

    def listed(self) -> dict[str, str]:
        """The names of its models, each with the digest of what it is.

        Raises:
            DeploymentError: it failed.
        """
        with self._talking("list its models"):
            return {str(model.model): str(model.digest) for model in self._client.list().models}

    def upload(self, file: Path) -> str:
        """Bring a file to the server, unless it is there; returns its digest, by which the server has checked it.

        Raises:
            DeploymentError: it failed.
        """
        import hashlib

        with file.open("rb") as content:
            digest = f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"
        with self._talking(f"take {file.name}"):
            if self._http.head(f"/api/blobs/{digest}").status_code == 200:
                return digest
            uploaded = str(self._client.create_blob(file))
        if uploaded != digest:
            raise DeploymentError(f"{file} has changed while it was sent to {self.address}", hint="deploy it again")
        return digest

    def create(self, name: str, file: str, digest: str, recipe: OllamaRecipe) -> None:
        """Create a model from an uploaded GGUF file.

        Raises:
            DeploymentError: it failed, or never said that it succeeded.
        """
        with self._talking(f"create {name}"):
            steps = self._client.create(
                name,
                files={file: digest},
                template=recipe.template,
                parameters=dict(recipe.parameters),
                license=list(recipe.licenses) or None,
                stream=True,
            )
            last = ""
            for step in steps:
                last = step.status or last
        if last != "success":
            raise DeploymentError(
                f"Ollama at {self.address} did not say that {name} was created: its last word was {last!r}",
                hint="see the server's own log, and deploy again",
            )

    def show(self, name: str) -> Mapping[str, Any]:
        """What the server says of a model: its `template` and `parameters`, among others.

        Raises:
            DeploymentError: it failed, or there is no such model.
        """
        with self._talking(f"show {name}"):
            told = self._client.show(name)
            return {"template": told.template or "", "parameters": told.parameters or ""}

    def copy(self, source: str, name: str) -> None:
        """Let another name mean what this one means.

        Raises:
            DeploymentError: it failed.
        """
        with self._talking(f"name {name}"):
            self._client.copy(source, name)

    def delete(self, name: str) -> None:
        """Remove a model.

        Raises:
            DeploymentError: it failed, or there is no such model.
        """
        with self._talking(f"delete {name}"):
            self._client.delete(name)
        if name in self.listed():
            raise DeploymentError(f"{name} is still at {self.address} after it was deleted", hint=f"ollama rm {name}")

    def chat(self, name: str, messages: Sequence[Mapping[str, str]], *, most: int, fresh: bool = False) -> Completion:
        """The likeliest answer to a conversation.

        Args:
            most: how many tokens it may have.
            fresh: the model is unloaded afterwards, so that the next prompt is counted whole.

        Raises:
            DeploymentError: it failed, or broke off.
        """
        options = {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0, "seed": 0, "num_predict": most}
        keep = 0 if fresh else None
        text, last = "", None
        with self._talking(f"answer as {name}"):
            for last in self._client.chat(name, messages=messages, options=options, stream=True, keep_alive=keep):
                text += last.message.content or ""
        if last is None or not last.done:
            raise DeploymentError(
                f"Ollama at {self.address} broke off in its answer as {name}, after {text[-40:]!r}",
                hint="see the server's own log, and ask again",
            )
        return Completion(text, last.done_reason == "stop", last.prompt_eval_count)

    def rendered(self, name: str, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The prompt that the server makes of a conversation; None where it is too old to tell.

        Raises:
            DeploymentError: it failed.
        """
        asked = {"model": name, "messages": list(messages), "stream": False, "_debug_render_only": True}
        with self._talking(f"render for {name}"):
            answer = self._http.post("/api/chat", json={**asked, "options": {"num_predict": 1}})
            told = answer.raise_for_status().json()
            return str(told["_debug_info"]["rendered_template"]) if "_debug_info" in told else None

    @contextlib.contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        """Turn whatever comes of a request into one clear error."""
        import httpx
        import ollama

        begun = f"Ollama at {self.address} could not {what}"
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError):
            raise DeploymentError(f"no Ollama answers at {self.address}", hint=START) from None
        except httpx.TimeoutException:
            raise DeploymentError(
                f"{begun}: nothing came for {self._patience.silence:g} s, or not all of it within "
                f"{self._patience.whole:g} s",
                hint="see whether the server is busy with another model (`ollama ps`), or restart it",
            ) from None
        except (ollama.ResponseError, httpx.HTTPStatusError) as error:
            raise DeploymentError(f"{begun}: it says {_words(error)}", hint="see the server's own log") from None
        except httpx.HTTPError as error:
            raise DeploymentError(
                f"{begun}: the connection broke ({error})", hint="see whether the server is still running"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DeploymentError(
                f"{begun}: what came is no answer of Ollama's ({' '.join(str(error).split())[:120]})",
                hint="see whether another program listens there",
            ) from None


def _words(error: Exception) -> str:
    """What the server itself said, on one line and not too long."""
    said = getattr(error, "error", None) or getattr(getattr(error, "response", None), "text", "") or str(error)
    return repr(" ".join(str(said).split())[:300])


def _bounded_transport(whole: float) -> "httpx.BaseTransport":
    """How requests travel: an answer that has not come whole by then is given up, however it trickles."""
    import httpx

    class Body(httpx.SyncByteStream):
        """An answer's content, up to its time and its size."""

        def __init__(self, inner: httpx.SyncByteStream, until: float) -> None:
            self._inner, self._until = inner, until

        def __iter__(self) -> Iterator[bytes]:
            left = _LONGEST_ANSWER
            for block in self._inner:
                left -= len(block)
                if time.monotonic() > self._until:
                    raise httpx.ReadTimeout("it took too long")
                if left < 0:
                    raise httpx.RemoteProtocolError(f"an answer of more than {_LONGEST_ANSWER:,} bytes")
                yield block

        def close(self) -> None:
            """Let the connection go."""
            self._inner.close()

    class Bounded(httpx.HTTPTransport):
        """Connections whose answers have a time each."""

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            """Send a request; its answer, whose head has come whole by then, too."""
            until = time.monotonic() + whole
            request.headers["Accept-Encoding"] = "identity"  # what unpacks has no size that could be seen
            answers: SimpleQueue[httpx.Response | BaseException] = SimpleQueue()

            def send(right: Callable[[httpx.Request], httpx.Response]) -> None:
                try:
                    answers.put(right(request))
                except BaseException as error:
                    answers.put(error)

            # Lines of a head, or promises of one, that drip begin each wait anew: only another thread can end it.
            Thread(target=send, args=(super().handle_request,), daemon=True).start()
            try:
                answer = answers.get(timeout=whole)
            except Empty:
                raise httpx.ReadTimeout("it took too long") from None
            if isinstance(answer, BaseException):
                raise answer
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                answer.close()
                raise httpx.RemoteProtocolError("an answer that is packed, which was not asked for")
            assert isinstance(answer.stream, httpx.SyncByteStream)
            answer.stream = Body(answer.stream, until)
            return answer

    # A connection that is kept breaks the next request where the server was started again meanwhile.
    return Bounded(limits=httpx.Limits(max_keepalive_connections=0))
