"""Laws of what lies where a file is meant and is none: a pipe, a device, a link to one is refused, never waited for."""

import io
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.cli.app import run
from finetune.reading import read_bytes, read_json
from finetune_strategies.profiles import examples
from support.workplace import make_data, make_model, settings
from support.workplace import run as train

pytestmark = [pytest.mark.tools, pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")]

SECONDS = 30
"""Far above what any refusal takes: only what waits without end takes longer."""
MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
)
LINES = {
    "rows.jsonl": "check --model model --data rows.jsonl",
    "rows.csv": "check --model model --data rows.csv",
    "held.jsonl": "check --model model --data good.jsonl --set data.valid=held.jsonl",
    "own.jinja": "check --model model --data good.jsonl --template own.jinja",
    "own.yaml": "check own.yaml",
    "finding.json": "replay finding.json",
    "subject.toml": "verify --subject subject.toml",
    "known.json": "verify --subject reference --baseline known.json",
    "history.jsonl": "report --history history.jsonl",
    "accelerate.yaml": "train --launch accelerate --launch-config accelerate.yaml --data good.jsonl --model model",
    **({"weights.gguf": "import weights.gguf"} if find_spec("gguf") else {}),
    "tools.json": "chat done --tools tools.json",
    "before.json": "chat done --messages before.json",
    **{f"model/{name}": "check --model model --data good.jsonl" for name in MODEL_FILES},
    "done/run.json": "report done",
    "done/plan.yaml": "evaluate done",
    "done/adapter/adapter_config.json": "chat done --prompt hello",
    "done/adapter/adapter_model.safetensors": "chat done --prompt hello",
    "done/adapter/tokenizer.json": "chat done --prompt hello",
    "lora/adapter_config.json": "check --model model --data good.jsonl --set model.adapter=lora",
    "lora/adapter_model.safetensors": "judge --base model --tuned lora --train good.jsonl --set adapter.rank=2",
    "begun/plan.yaml": "train --resume --output begun",
    "begun/events.jsonl": "train --resume --output begun",
}
"""Each file that a command reads, and the command."""


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # the whole path may be too long


def _linked_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "link to a pipe": _linked_fifo,
    "socket": _socket,
    # It ends at once, so that a reader that takes any device is seen without filling the memory.
    "link to a device": lambda path: path.symlink_to("/dev/null"),
    "folder": Path.mkdir,
}
WORDS = ("pipe, a device or a socket", "folder", "Is a directory", "symbolic link", "changed or gone", "holds no run")
"""What is said: what it is, or, of a part of a run, that it is not what was written."""


@contextmanager
def patience() -> Iterator[None]:
    """Within this context, what waits without end is ended as a failure."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it was still waited for after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, a finished run and one that was begun."""
    home = tmp_path_factory.mktemp("place")
    model, rows = make_model(home / "model"), make_data(home / "good.jsonl", 5)
    loaded = settings(model, rows, training__save_every=1)
    train(loaded, home / "done")
    train(loaded, home / "begun", death=12)
    shutil.copytree(home / "done/adapter", home / "lora")
    assert (home / "done/run.json").exists()
    assert list((home / "begun/checkpoints").iterdir())
    assert not (home / "begun/run.json").exists()
    return home


@given(st.sampled_from(sorted(LINES)), st.sampled_from(sorted(NO_FILES)))
@examples(40)
def test_what_is_no_file_is_refused_by_name(place: Path, name: str, kind: str) -> None:
    """Whatever is read: a clear error names it and what it is, in a moment."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.setenv("HF_HUB_OFFLINE", "1")
        patched.setenv("FT_BACKEND", "reference")
        code, said = refused_in(place, name, kind)
    assert code in (1, 2, 3, 4), said
    assert Path(name).name in said or "/pipe:" in said, said
    assert any(words in said for words in WORDS), said


def refused_in(place: Path, name: str, kind: str) -> tuple[int, str]:
    """Put what is no file where one is meant, run the command, and put back what was there."""
    path, kept = place / name, place / "kept"
    if path.exists():
        shutil.move(path, kept)
    out = io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(path.parent)
            NO_FILES[kind](path)
        with patience(), redirect_stdout(out), redirect_stderr(out):
            code = run(LINES[name].split())
        return code, out.getvalue()
    finally:
        for made in (path, path.with_name("pipe")):
            made.rmdir() if made.is_dir() else made.unlink(missing_ok=True)
        if kept.exists():
            shutil.move(kept, path)


@given(st.integers(0, 300), st.integers(0, 300))
@examples(20)
def test_no_more_is_read_than_may_be(tmp_path_factory: pytest.TempPathFactory, size: int, most: int) -> None:
    """A file of at most so many bytes is read whole; of a longer one nothing is given."""
    path = tmp_path_factory.mktemp("sized") / "file"
    path.write_bytes(b"x" * size)
    if size <= most:
        assert read_bytes(path, most) == b"x" * size
    else:
        with pytest.raises(OSError, match=f"{most:,} are the most"):
            read_bytes(path, most)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 400, "-" + "1" * 5000, "[1", "\udcff", ""])
def test_json_that_cannot_be_used_is_a_value_error(tmp_path: Path, text: str) -> None:
    """Nested too deep, a number beyond every float, cut off, not UTF-8: one kind of error, which every reader knows."""
    path = tmp_path / "file.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"deep|digits|delimiter|decode|Expecting"):
        read_json(path)
