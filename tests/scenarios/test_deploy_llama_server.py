"""llama.cpp's server in a process of its own: it serves what was trained, says what fails, and never outlives us."""

import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

from finetune.errors import DeploymentError
from finetune.serve.llama_server import ServerTimeouts, llama_server
from support.served_models import shipped_gguf

pytestmark = pytest.mark.tier2
ASKED = [{"role": "user", "content": "What is 2 plus 2?"}]
ALONE = """
import sys, time
from pathlib import Path
from finetune.serve.llama_server import llama_server
with llama_server(Path(sys.argv[1]), context=64, name="x") as server:
    print(server._process.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def file() -> Path:
    """A GGUF file of a shipped model."""
    return shipped_gguf()


def gone(number: int) -> bool:
    """Whether a process is no more, or ends soon."""
    until = time.monotonic() + 60
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_llama_server_answers_and_ends(file: Path) -> None:
    """It counts as many tokens as it tells ids, stops by itself, tells a mistake in its words, and ends with us."""
    with llama_server(file, context=64, name="mine") as server:
        ids = server.rendered_ids(ASKED)
        said = server.chat(ASKED, most=8)
        assert said.prompt_tokens == len(ids)
        assert said.text
        with pytest.raises(DeploymentError, match=r"it says .*content"):
            server.ask("v1/chat/completions", {"messages": [{"role": "user"}]})
        number = server._process.pid
    assert gone(number)


def test_llama_server_that_dies_is_told(file: Path) -> None:
    """A server that is killed is told as ended, by its code, and not as a connection that broke."""
    with llama_server(file, context=64, name="mine") as server:
        server._process.kill()
        server._process.wait()
        with pytest.raises(DeploymentError, match=r"has ended \(code -9\)"):
            server.chat(ASKED, most=8)


def test_llama_server_that_cannot_begin_says_why(file: Path, tmp_path: Path) -> None:
    """No file, half a file, a port that is taken, and no time: each is told, and no process is left."""
    half = tmp_path / "half.gguf"
    half.write_bytes(file.read_bytes()[:200_000])
    before = len(psutil.Process().children())
    for path in (tmp_path / "none.gguf", half):
        with (
            pytest.raises(DeploymentError, match=r"llama\.cpp cannot load it"),
            llama_server(path, context=64, name="x"),
        ):
            pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeploymentError, match="HTTP server"), llama_server(file, context=64, name="x", port=port):
            pass
    with (
        pytest.raises(DeploymentError, match="had not loaded the file after 0 s"),
        llama_server(file, context=64, name="x", patience=ServerTimeouts(load=0)),
    ):
        pass
    assert len(psutil.Process().children()) == before


def test_llama_server_ends_when_we_are_killed(file: Path) -> None:
    """Whoever is killed by SIGKILL leaves no server behind."""
    command = [sys.executable, "-c", ALONE, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        number = int(ours.stdout.readline())
        assert psutil.pid_exists(number)
        ours.send_signal(signal.SIGKILL)
    assert gone(number)


def test_answer_that_the_chat_api_refuses_to_read_is_taken_as_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server knows a format of the template, an answer that is not in it comes as plain text, marked so."""
    with llama_server(file, context=64, name="mine") as server:
        read = server.chat(ASKED, most=8)

        def refuse(*given: object, **named: object) -> None:
            raise DeploymentError(
                "it says The model produced output that does not match the expected peg-native format"
            )

        monkeypatch.setattr(server, "_complete", refuse)
        assert server.chat(ASKED, most=8) == replace(read, read=False)
