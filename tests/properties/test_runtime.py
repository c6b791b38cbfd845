"""llama.cpp's server is asked on this machine, whatever stands between it and the world."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune.export.llama_runtime import Line, get, post

pytestmark = pytest.mark.tools


class Echo(BaseHTTPRequestHandler):
    """Answers with what was asked."""

    def do_GET(self) -> None:
        """Tell the path."""
        self._say({"path": self.path})

    def do_POST(self) -> None:
        """Tell the path and the body."""
        self._say({"path": self.path, "body": json.loads(self.rfile.read(int(self.headers["Content-Length"])))})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _say(self, value: dict[str, object]) -> None:
        said = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_runtime_asks_past_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that the environment names, which cannot see this machine, does not come between."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Echo) as address:
        assert get(address, "health", timeout=60) == {"path": "/health"}
        for ask in (partial(post, address, timeout=60), Line(address, timeout=60).ask):
            assert ask("tokenize", {"content": "a"}) == {"path": "/tokenize", "body": {"content": "a"}}


class Kept(Echo):
    """Keeps a connection open for three answers and then closes it unsaid, as a server does in a pause."""

    protocol_version = "HTTP/1.1"
    opened = 0

    def setup(self) -> None:
        """Count the connection."""
        super().setup()
        type(self).opened += 1
        self.left = 3

    def _say(self, value: dict[str, object]) -> None:
        self.left -= 1
        self.close_connection = self.left == 0
        if value["path"] == "/wrong":
            self.send_error(400, explain="no such thing")
        else:
            super()._say(value)


def test_line_asks_over_one_connection_as_long_as_that_is_open() -> None:
    """Seven questions need three connections of three answers each; a refusal is told, and one that is gone is, too."""
    with serving(Kept) as address:
        line = Line(address, timeout=60)
        for number in range(7):
            assert line.ask("tokenize", {"content": number}) == {"path": "/tokenize", "body": {"content": number}}
        assert Kept.opened == 3
        with pytest.raises(OSError, match=r"(?s)refuses wrong: .*no such thing"):
            line.ask("wrong", {})
    with pytest.raises(ConnectionError):
        line.ask("tokenize", {})


LATE = """
import os, sys, threading, time, types
from pathlib import Path

class Params:
    model = types.SimpleNamespace(path="")
    cpuparams = cpuparams_batch = types.SimpleNamespace()

def server(params):
    def later():
        os.write(2, b"1 I srv start: begins\\n")
        time.sleep(0.3)
        os.write(2, b"1 E srv init: exiting due to an error of its own\\n")
    threading.Thread(target=later).start()
    raise RuntimeError("Failed to init server, please check the input params.")

sys.modules["xllamacpp"] = types.SimpleNamespace(CommonParams=Params, Server=server)
from finetune.export.llama_runtime import load_chat
load_chat(Path("model.gguf"), context=8, port=0, name="x")
"""
"""A llama.cpp that says why it cannot begin only after it has said that it cannot, as its own log thread may."""


def test_runtime_waits_for_what_llama_cpp_says_late() -> None:
    """Why it cannot begin is told, though it comes from a thread of llama.cpp's after the refusal."""
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "llama.cpp cannot load it: exiting due to an error of its own"
