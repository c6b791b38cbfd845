"""Laws of the client of a server that is hostile or broken: one clear error in bounded time and memory, rows stay."""

import contextlib
import gzip
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("ollama", reason="needs the ollama extra: pip install 'finetune-suite[ollama]'")

from finetune.errors import DeploymentError, UsageError
from finetune.serve.ollama import Ollama, OllamaTimeouts

pytestmark = pytest.mark.tier2
SHORT = OllamaTimeouts(connect=1, silence=1, whole=1)
OK = b"HTTP/1.1 200 OK\r\n"


@contextlib.contextmanager
def serving(pieces: Callable[[], Iterator[bytes]], asked: list[bytes]) -> Iterator[str]:
    """A server that answers everything with these pieces; it notes what it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError):
                asked.append(client.recv(65536))
                for piece in pieces():
                    client.sendall(piece)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def slowly(piece: bytes, first: bytes = b"") -> Iterator[bytes]:
    """One piece after another, without end."""
    yield first
    for _ in itertools.count():
        time.sleep(0.02)
        yield piece


BOMB = gzip.compress(b" " * 80_000_000)
HOSTILE: dict[str, Callable[[], Iterator[bytes]]] = {
    "a head that drips": lambda: slowly(b"X", OK),
    "promises of an answer": lambda: slowly(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "an answer that drips": lambda: slowly(b" ", OK + b"\r\n"),
    "an answer without end": lambda: itertools.chain([OK + b"\r\n"], itertools.repeat(b" " * 1_000_000)),
    "a packed one": lambda: iter([OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB), BOMB]),
    "a deep one": lambda: iter([OK + b"Content-Length: 100000\r\n\r\n", b"[" * 100_000]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_answer_is_one_clear_error(what: str) -> None:
    """Whatever comes, and however slowly, the client gives it up in its time."""
    with serving(HOSTILE[what], []) as address:
        client, began = Ollama(address, patience=SHORT), time.monotonic()
        for ask in (client.version, lambda: client.chat("a:b", [{"role": "user", "content": "x"}], most=3)):
            with pytest.raises(DeploymentError) as caught:
                ask()
            assert caught.value.hint
        assert time.monotonic() - began < 20


def test_rows_do_not_travel_to_another_host() -> None:
    """A redirect is no answer: the host that it names is asked nothing."""
    asked: list[bytes] = []
    with serving(lambda: iter([OK + b"Content-Length: 17\r\n\r\n", b'{"version":"1.0"}']), asked) as other:
        moved = f"HTTP/1.1 307 Moved\r\nLocation: http://{other}/\r\nContent-Length: 0\r\n\r\n".encode()
        with serving(lambda: iter([moved]), []) as address:
            client = Ollama(address, patience=SHORT)
            for ask in (client.version, lambda: client.chat("a:b", [{"role": "user", "content": "secret"}], most=3)):
                with pytest.raises(DeploymentError):
                    ask()
    assert asked == []


@pytest.mark.parametrize("host", ["127.0.0.1:99999", "http://[::1", "127.0.0.1:-1", "ftp://x", "http://"])
def test_address_that_is_none_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its variable, with how to write one."""
    monkeypatch.setenv("OLLAMA_HOST", host)
    with pytest.raises(UsageError, match="OLLAMA_HOST") as caught:
        Ollama()
    assert "127.0.0.1:11434" in caught.value.hint
