"""A server that speaks Ollama's protocol, with troubles on demand, for machines that have no Ollama.

What it does is what Ollama publishes; the pages are those of https://docs.ollama.com/api and, where they say less,
Ollama's own source. `HEAD` and `POST /api/blobs/:digest`: page "Create a Model", 200 or 404, 201 or 400 where the
digest is another. `/api/create` by `files`, NDJSON up to `success`, errors in mid-stream with status 200: the same page
and `server/create.go`. `/api/tags`, `/api/show`, `/api/copy`, `/api/delete`, `/api/version`: the pages of those names.
`/api/chat`, streamed or not, with `done_reason` and `prompt_eval_count`: page "Generate a chat completion"; roles are
joined as in `template/template.go` and rendered by the model's own TEMPLATE; `_debug_render_only`: `server/routes.go`.

Models outlive the server's process, as Ollama's do: `stop` and `start` again.
"""

import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from finetune.serve.go_template import ExecutionError, GoTemplate

_NAME = re.compile(r"(?:[\w.:-]+/)?(?:[\w-]+/)?\w[\w.-]{0,79}:\w[\w.-]{0,79}", re.ASCII)
_DRIP = 0.02
_PATIENCE = 60


@dataclass(frozen=True)
class Trouble:
    """What goes wrong with the next answer to a path.

    Args:
        path: the request's path, or its beginning.
        kind: half-closed after `at` bytes; nothing at all; no JSON; status 500; an error within a stream of status 200;
            one byte after another; or the server is gone from then on.
        at: how many bytes are sent, or where among the lines of a stream the error stands.
        done: whether what was asked for is done all the same.
    """

    path: str
    kind: Literal["half-closed", "hang", "garbage", "refused", "stream error", "drip", "gone"]
    at: int = 0
    done: bool = False


@dataclass(frozen=True)
class Model:
    """What one name means."""

    digest: str
    template: str
    parameters: Mapping[str, Any]
    licenses: tuple[str, ...]

    @property
    def mark(self) -> str:
        """The digest of all of it."""
        told = [self.digest, self.template, sorted(self.parameters.items()), self.licenses]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True)
class Spoken:
    """What a model says."""

    text: str
    ended: bool = True
    prompt_tokens: int = 1


Speak = Callable[[bytes, Model, str, int], Spoken]
"""The content of a model's file, the model, a prompt and the most tokens, as what it says."""


def echo(content: bytes, model: Model, prompt: str, most: int) -> Spoken:
    """Says which file, template and stops the model has, and what it was asked."""
    assert model.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    told = [model.digest, model.template, list(model.parameters["stop"]), prompt]
    return Spoken(json.dumps(told), prompt_tokens=len(prompt))


@dataclass
class StandIn:
    """The server; `running` starts it."""

    speak: Speak = echo
    tells_renderings: bool = True
    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    port: int = 0
    _server: ThreadingHTTPServer | None = None
    _released: threading.Event = field(default_factory=threading.Event)
    _ending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, at the same place as before where it did."""
        assert self._server is None
        stand_in = self
        self._released.clear()

        class Handler(_Handler):
            owner = stand_in

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that goes is nobody's trouble but its own; all else is one of this file's."""
                error = sys.exc_info()[1]
                if not isinstance(error, ConnectionError):
                    stand_in.faults.append(repr(error))

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Be gone; nothing happens where it is already."""
        self._end(self._server)

    def _end(self, server: ThreadingHTTPServer | None) -> None:
        with self._ending:
            if server is None or self._server is not server:
                return
            self._released.set()
            server.shutdown()
            server.server_close()
            self._server = None
        assert self.faults == [], self.faults

    def trouble(self, path: str) -> Trouble | None:
        """The next trouble of a path; it comes once."""
        found = next((each for each in self.troubles if path.startswith(each.path)), None)
        if found is not None:
            self.troubles.remove(found)
        return found

    def hang(self) -> None:
        """Say nothing until the server stops."""
        self._released.wait(_PATIENCE)

    def leave(self) -> None:
        """Be gone, from within a request."""
        threading.Thread(target=self._end, args=[self._server], daemon=True).start()


@contextlib.contextmanager
def running(**changes: Any) -> Iterator[StandIn]:
    """A server, for this context."""
    stand_in = StandIn(**changes)
    stand_in.start()
    try:
        yield stand_in
    finally:
        stand_in.stop()


class _RefusedError(Exception):
    """The status and the words of an answer that is none."""


class _Handler(BaseHTTPRequestHandler):
    owner: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *given: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Whether a blob is there."""
        self._answer(lambda: (200 if self.path.rsplit("/", 1)[-1] in self.owner.blobs else 404, b""))

    def do_GET(self) -> None:
        """Its version, or its models."""
        self._answer({"/api/version": self._version, "/api/tags": self._tags}.get(self.path, self._unknown))

    def do_DELETE(self) -> None:
        """Remove a model."""
        self._answer(self._delete)

    def do_POST(self) -> None:
        """All else."""
        if self.path.startswith("/api/blobs/"):
            self._answer(self._blob)
            return
        known = {"create": self._create, "show": self._show, "copy": self._copy, "chat": self._chat}
        self._answer(known.get(self.path.removeprefix("/api/"), self._unknown))

    def _answer(self, act: Callable[[], tuple[int, bytes]]) -> None:
        self.owner.asked.append(f"{self.command} {self.path}")
        trouble = self.owner.trouble(self.path)
        self.body = self._read()
        if trouble is None or trouble.done or trouble.kind in ("drip", "half-closed", "stream error"):
            # Of a request that is answered with an error in mid-stream nothing is done.
            kept = (dict(self.owner.blobs), dict(self.owner.models))
            try:
                status, content = act()
            except _RefusedError as error:
                status, words = error.args
                content = json.dumps({"error": words}).encode()
            if trouble is not None and not trouble.done:
                self.owner.blobs, self.owner.models = kept
        if trouble is None:
            self._send(status, content)
            return
        self.close_connection = True
        if trouble.kind == "hang":
            self.owner.hang()
        elif trouble.kind == "gone":
            self.owner.leave()
        elif trouble.kind == "garbage":
            self._send(200, b"<html>It works!</html>\n")
        elif trouble.kind == "refused":
            self._send(500, b'{"error":"something is wrong in here"}')
        elif trouble.kind == "stream error":
            lines = content.splitlines(keepends=True)
            self._send(200, b"".join(lines[: trouble.at % max(1, len(lines))]) + b'{"error":"it broke on the way"}\n')
        else:
            self._trickle(self._whole(status, content), trouble)

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _whole(self, status: int, content: bytes) -> bytes:
        head = f"HTTP/1.1 {status} told\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        return head.encode() + (b"" if self.command == "HEAD" else content)

    def _send(self, status: int, content: bytes) -> None:
        self.wfile.write(self._whole(status, content))
        self.wfile.flush()

    def _trickle(self, whole: bytes, trouble: Trouble) -> None:
        if trouble.kind == "half-closed":
            self.wfile.write(whole[: trouble.at % len(whole)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            return
        # The head comes at once, so that it is the answer that trickles.
        body = whole.index(b"\r\n\r\n") + 4
        self.wfile.write(whole[:body])
        for byte in whole[body:]:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(_DRIP)

    def _asked(self) -> dict[str, Any]:
        try:
            told: dict[str, Any] = json.loads(self.body)
        except ValueError as error:
            raise _RefusedError(400, str(error)) from None
        return told

    def _model(self, name: str) -> Model:
        if name not in self.owner.models:
            raise _RefusedError(404, f"model '{name}' not found")
        return self.owner.models[name]

    def _unknown(self) -> tuple[int, bytes]:
        return 404, b"404 page not found"

    def _version(self) -> tuple[int, bytes]:
        return 200, b'{"version":"0.0.0-stand-in"}'

    def _tags(self) -> tuple[int, bytes]:
        models = [
            {"name": name, "model": name, "digest": model.mark, "size": len(self.owner.blobs[model.digest])}
            for name, model in self.owner.models.items()
        ]
        return 200, json.dumps({"models": models}).encode()

    def _blob(self) -> tuple[int, bytes]:
        digest = self.path.rsplit("/", 1)[-1]
        if digest != f"sha256:{hashlib.sha256(self.body).hexdigest()}":
            raise _RefusedError(400, "digest mismatch")
        self.owner.blobs[digest] = self.body
        return 201, b""

    def _create(self) -> tuple[int, bytes]:
        asked = self._asked()
        name, files = asked["model"], asked.get("files") or {}
        if not _NAME.fullmatch(name):
            raise _RefusedError(400, "invalid model name")
        if asked.get("adapters"):
            raise _RefusedError(400, "LoRA adapters are no longer supported")
        digests = [digest for digest in files.values() if digest in self.owner.blobs]
        if len(digests) != len(files):
            raise _RefusedError(400, "blob not found")
        lines: list[dict[str, Any]] = [{"status": "parsing GGUF"}]
        if not digests or not self.owner.blobs[digests[0]].startswith(b"GGUF"):
            return 200, _lines([*lines, {"error": "supplied file was not in GGUF format"}])
        template = asked.get("template") or "{{ .Prompt }}"
        licenses = asked.get("license") or []
        told = Model(digests[0], template, asked.get("parameters") or {}, tuple(licenses))
        self.owner.models[name] = told
        lines += [{"status": f"creating new layer {digests[0]}"}, {"status": "writing manifest"}]
        return 200, _lines([*lines, {"status": "success"}])

    def _show(self) -> tuple[int, bytes]:
        model = self._model(self._asked()["model"])
        named = [
            (key, each)
            for key, value in model.parameters.items()
            for each in (value if isinstance(value, list) else [value])
        ]
        shown = "\n".join(f"{key:<30} {json.dumps(value, ensure_ascii=False)}" for key, value in named)
        return 200, json.dumps({"template": model.template, "parameters": shown, "model_info": {}}).encode()

    def _copy(self) -> tuple[int, bytes]:
        asked = self._asked()
        self.owner.models[asked["destination"]] = self._model(asked["source"])
        return 200, b""

    def _delete(self) -> tuple[int, bytes]:
        name = self._asked()["model"]
        self._model(name)
        del self.owner.models[name]
        return 200, b""

    def _chat(self) -> tuple[int, bytes]:
        asked = self._asked()
        model = self._model(asked["model"])
        try:
            prompt = GoTemplate(model.template).render(_collated(asked["messages"]))
        except ExecutionError as error:
            raise _RefusedError(500, str(error)) from None
        head = {"model": asked["model"], "created_at": "2026-01-01T00:00:00Z"}
        if asked.get("_debug_render_only") and self.owner.tells_renderings:
            return 200, json.dumps({**head, "_debug_info": {"rendered_template": prompt}}).encode()
        most = asked.get("options", {}).get("num_predict", 8)
        said = self.owner.speak(self.owner.blobs[model.digest], model, prompt, most)
        end = {"done": True, "done_reason": "stop" if said.ended else "length", "prompt_eval_count": said.prompt_tokens}
        if asked.get("stream") is False:
            return 200, json.dumps({**head, "message": {"role": "assistant", "content": said.text}, **end}).encode()
        parts = [said.text[at : at + 5] for at in range(0, len(said.text), 5)]
        lines = [{**head, "message": {"role": "assistant", "content": part}, "done": False} for part in parts]
        return 200, _lines([*lines, {**head, "message": {"role": "assistant", "content": ""}, **end}])


def _lines(told: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in told).encode()


def _collated(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Neighbours of the same role are one message."""
    found: list[dict[str, str]] = []
    for message in messages:
        role, content = message["role"], message.get("content", "")  # the library leaves out what is empty
        if found and found[-1]["role"] == role:
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n\n{content}"}
        else:
            found.append({"role": role, "content": content})
    return found
