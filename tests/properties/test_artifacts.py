"""Laws of what a run leaves on disk: whole or not there, in a folder that is its own."""

import errno
import json
import math
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.errors import OutputError, StorageError
from finetune.events import CheckpointSaved, FixedLoss, HeldOutLoss, RunJudged, RunStarted, StepDone
from finetune.files import describe_files, write_folder, write_json, write_text
from finetune.run import folder as run_folder
from finetune.run.folder import RunFolder, new_run_id
from finetune_strategies.profiles import examples
from finetune_strategies.scratch import empty_folder
from support.disks import everything_below, full_after, read_only_folder

BIG = "ä" * 40_000


def _no_space(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_run(output: Path | None) -> RunFolder:
    """A new run folder, made."""
    run = RunFolder.place(output)
    run.make()
    return run


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (Path, "open")])
def test_write_text_old_content_survives_any_failing_call(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call to the system fails, the error is ours, the old file is intact and nothing else is left."""
    path = tmp_path / "run.json"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _no_space)
        with pytest.raises(StorageError, match="No space left"):
            write_text(path, "new")
    assert everything_below(tmp_path) == {"run.json": b"old"}


def test_write_text_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new text is flushed to disk first and renamed last: a power cut leaves the old file or the new one."""
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("flush"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("rename"), replace(self, to))[1])
    write_text(tmp_path / "a", "text")
    assert order[:2] == ["flush", "rename"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
@examples(2 / 3)
def test_write_text_is_read_back(text: str) -> None:
    """What is read back is the text, line ends and all, on any system."""
    with empty_folder() as folder:
        path = folder / "text"
        write_text(path, text)
        assert path.read_bytes() == text.encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_write_json_refuses_what_json_has_not(value: float, tmp_path: Path) -> None:
    """NaN and infinity are refused, in files and in the event log, and the old file stays."""
    write_json(tmp_path / "a.json", {"é": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"deep": [value]})
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="JSON"):
        run.log(HeldOutLoss(1, value, 1))
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"é": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "run"]


def _fails_halfway(folder: Path) -> None:
    (folder / "first").write_text("whole")
    (folder / "second").write_text(BIG)


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_write_folder_all_or_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose writing fails, at whatever point, is not there at all, and neither is what was written so far."""
    target = tmp_path / "adapter"
    with full_after(9_999), pytest.raises(StorageError):
        write_folder(target, _fails_halfway)
    assert everything_below(tmp_path) == {}
    with monkeypatch.context() as patch:
        patch.setattr(*(os, "fsync", _no_space) if name == "fsync" else (Path, "rename", _no_space))
        with pytest.raises(StorageError, match="No space left"):
            write_folder(target, _fails_halfway)
    assert everything_below(tmp_path) == {}
    write_folder(target, _fails_halfway)
    assert everything_below(target) == {"first": b"whole", "second": BIG.encode()}


def test_write_folder_is_on_disk_before_and_after_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is flushed, then the folder renamed, then its name flushed, before anything older may be removed."""
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename
    kinds = {True: "flush folder", False: "flush file"}

    def flushed(handle: int) -> None:
        order.append(kinds[stat.S_ISDIR(os.fstat(handle).st_mode)])
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append("rename"), rename(self, to))[1])
    write_folder(tmp_path / "a", lambda folder: [(folder / name).write_text(name) for name in "xyz"] and None)
    assert order == ["flush file"] * 3 + ["rename", "flush folder"]


@pytest.mark.parametrize(
    "words", ["I/O error: No space left on device (os error 28)", "Error while serializing: IoError(os error 122)"]
)
def test_write_folder_a_library_that_meets_a_full_disk_is_understood(words: str, tmp_path: Path) -> None:
    """A full disk that a library reports in its own way becomes our error; any other error of its stays what it is."""

    def fill(folder: Path) -> None:
        raise RuntimeError(words)

    def stumble(folder: Path) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(StorageError, match="os error"):
        write_folder(tmp_path / "adapter", fill)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        write_folder(tmp_path / "adapter", stumble)
    assert everything_below(tmp_path) == {}


def test_write_folder_never_replaces_one(tmp_path: Path) -> None:
    """A folder with content in the way is neither mixed with the new one nor lost."""
    write_folder(tmp_path / "a", lambda folder: (folder / "old").write_text("old") and None)
    with pytest.raises(StorageError):
        write_folder(tmp_path / "a", lambda folder: (folder / "new").write_text("new") and None)
    assert everything_below(tmp_path) == {"a": None, "a/old": b"old"}


def test_describe_files_sees_every_byte(tmp_path: Path) -> None:
    """Files at any depth are listed in order with size and hash, and any change of content shows."""
    for name, content in (("b/c.bin", b"x" * 3_000_000), ("a.txt", b""), (".hidden", b"1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    described = describe_files(tmp_path)
    assert [(file["path"], file["bytes"]) for file in described] == [
        (".hidden", 1),
        ("a.txt", 0),
        ("b/c.bin", 3_000_000),
    ]
    with (tmp_path / "b/c.bin").open("r+b") as file:
        file.seek(2_999_999)
        file.write(b"y")
    assert [old == new for old, new in zip(described, describe_files(tmp_path), strict=True)] == [True, True, False]


def _file(path: Path) -> None:
    path.write_text("mine")


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def _link_to_folder(path: Path) -> None:
    path.with_name("target").mkdir()
    path.symlink_to(path.with_name("target"))


def _dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("arrange", [_file, _full_folder, _link_to_folder, _dangling_link, _pipe])
def test_run_folder_create_refuses_what_is_there(arrange: Callable[[Path], None], tmp_path: Path) -> None:
    """A file, a folder with content, a link or anything else in the way is refused by name, and nothing changes."""
    path = tmp_path / "out"
    arrange(path)
    names = sorted(file.name for file in tmp_path.rglob("*"))
    with pytest.raises(OutputError) as caught:
        make_run(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 3
    assert sorted(file.name for file in tmp_path.rglob("*")) == names


def test_run_folder_create_where_nothing_can_be_made_is_refused(tmp_path: Path) -> None:
    """An output below a file, in a folder we may not write, or that folder itself is refused before any work."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        make_run(tmp_path / "file" / "out")
    with read_only_folder() as folder:
        for output in (folder / "out", folder):
            with pytest.raises(OutputError, match="cannot be written") as caught:
                make_run(output)
            assert caught.value.hint
        assert everything_below(folder) == {}


def test_run_folder_create_makes_an_empty_folder(tmp_path: Path) -> None:
    """A missing folder is made with its parents, an empty one is used, and nothing is left in it by the making."""
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b" / "run", tmp_path / "empty"):
        assert make_run(path).path == path
        assert everything_below(path) == {}


def test_run_folder_of_a_run_that_was_killed_while_beginning_is_free(tmp_path: Path) -> None:
    """Without a plan nothing can be gone on with: what is left half written keeps nobody out, and goes."""
    path = tmp_path / "run"
    path.mkdir()
    for name in (".plan.yaml.7.part", ".writable.7.part", "lock.json"):
        (path / name).write_text("{")
    run = make_run(path)
    run.claim()
    run.tidy()
    run.release()
    assert everything_below(path) == {}
    (path / ".notes").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        RunFolder.place(path)


def test_run_folder_own_names_sort_by_time_and_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an output each run has a folder of its own below runs/ that tells the time in UTC; the newest sorts last.

    Thousands of names made as fast as a processor can differ, without any help of chance.
    """
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    before, name, after = (datetime.now(UTC), new_run_id(), datetime.now(UTC))
    monkeypatch.undo()
    time.tzset()
    assert f"{before:%Y%m%d-%H%M%S-%f}" <= name[:22] <= f"{after:%Y%m%d-%H%M%S-%f}"
    assert len({new_run_id() for _ in range(5000)}) == 5000
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.secrets, "token_hex", lambda size: "0" * 2 * size)
    made = [make_run(None).path for _ in range(20)]
    assert len(set(made)) == 20
    assert made == sorted(made)
    assert {path.parent for path in made} == {Path("runs")}


def _run(path: Path, *, plan: bool = True, manifest: str | None = None) -> RunFolder:
    path.mkdir(parents=True)
    run = RunFolder(path)
    if plan:
        run.plan.write_text("{}")
    if manifest is not None:
        run.manifest.write_text(manifest)
    return run


def test_run_folder_unfinished_is_a_plan_without_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a run with a plan and no run.json can be resumed; without a name it is the newest such run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="no unfinished run"):
        RunFolder.unfinished(None)
    _run(Path("runs/20250101-000000-aaaa"))
    _run(Path("runs/20260101-000000-bbbb"))
    _run(Path("runs/20270101-000000-cccc"), manifest="{}")
    _run(Path("runs/20280101-000000-dddd"), plan=False)
    assert RunFolder.unfinished(None).path.name == "20260101-000000-bbbb"
    assert RunFolder.unfinished(Path("runs/20250101-000000-aaaa")).path.name == "20250101-000000-aaaa"
    for name, word in (
        ("20270101-000000-cccc", "finished"),
        ("20280101-000000-dddd", "not a run folder"),
        ("x", "not a run folder"),
    ):
        with pytest.raises(OutputError, match=word) as caught:
            RunFolder.unfinished(Path("runs") / name)
        assert caught.value.hint


def test_run_folder_finished_needs_the_manifest(tmp_path: Path) -> None:
    """A run exists when its run.json does; one that is not finished is told how to go on."""
    whole: dict[str, object] = {key: {} for key in ("model", "data", "losses", "versions")}
    whole |= {key: [] for key in ("plan", "verdicts", "notes")}
    _run(tmp_path / "done", manifest=json.dumps({"format": 2, **whole}))
    assert RunFolder.finished(tmp_path / "done").read_manifest() == {"format": 2, **whole}
    _run(tmp_path / "half")
    for name, hint in (("half", "--resume"), ("missing", "ft train")):
        with pytest.raises(OutputError, match=name) as caught:
            RunFolder.finished(tmp_path / name)
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b'"text"', b'[["a", 1]]', b"\xff{}", b'{"a": 1}{']
)
def test_run_folder_a_broken_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    """A run.json that is cut off, not text or no object is refused by name."""
    run = _run(tmp_path / "run")
    run.manifest.write_bytes(content)
    with pytest.raises(OutputError, match=r"run\.json is broken") as caught:
        run.read_manifest()
    assert caught.value.hint


def test_run_folder_tidy_leaves_what_a_resume_needs(tmp_path: Path) -> None:
    """Before a killed run goes on, half-written files, adapter and report go, and nothing else does."""
    run = _run(tmp_path / "run")
    torn = (
        ".run.json.77.part",
        ".adapter.77.part/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "checkpoints/.step-00000002.77.part/checkpoint.json",
    )
    for name in (*torn, "report.html", "report.json"):
        (run.path / name).parent.mkdir(exist_ok=True, parents=True)
        (run.path / name).write_text("half")
    run.log(HeldOutLoss(1, 2.0, 3))
    run.tidy()
    run.tidy()
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "events.jsonl", "plan.yaml"]
    assert list(run.checkpoints.iterdir()) == []


def test_run_folder_claim_keeps_everybody_else_out_until_release(tmp_path: Path) -> None:
    """A claimed run is refused to others, in this process too, by the holder's id, and free again after release."""
    first, second = make_run(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.claim()
    with pytest.raises(OutputError, match=rf"another process \(process {os.getpid()} on .+\) is at work"):
        second.claim()
    second.release()
    assert first.describe() == []
    for _ in range(2):
        first.release()
    second.claim()
    second.release()
    assert list((tmp_path / "run").iterdir()) == []


HOLDER = """
import sys
from pathlib import Path
from finetune.run.folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.claim()
print("claimed", flush=True)
sys.stdin.read()
"""


def test_run_folder_claim_names_the_process_that_holds_it(tmp_path: Path) -> None:
    """Another process's claim is told with its id; what a dead one left of its own, or what is no id, holds nobody."""
    run = make_run(tmp_path / "run")
    lefts = ("", "{", "[1]", '{"pid": "x", "host": 3}', '{"pid": 1}')
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        own = run.holder.read_text()
        for left in (None, *lefts):
            if left is not None:
                run.holder.write_text(left)
            with pytest.raises(OutputError, match="is at work") as caught:
                run.claim()
            assert (f"process {holder.pid} on {socket.gethostname()}" in str(caught.value)) == (left is None)
        holder.kill()
    for left in (own, *lefts):
        run.holder.write_text(left)
        assert RunFolder.place(run.path).path == run.path
        run.claim()
        assert json.loads(run.holder.read_text())["pid"] == os.getpid()
        run.release()


@given(st.integers(0, 6), st.integers(0, 6))
def test_run_folder_events_without_steps_are_no_ground_to_go_on_from(steps: int, done: int) -> None:
    """A log that lacks steps before the checkpoint is refused by name; later steps are forgotten, and so is the end."""
    with tempfile.TemporaryDirectory() as folder:
        run = _run(Path(folder) / "run")
        run.log(RunStarted("then", "ft train", "id"))
        for step in range(1, steps + 1):
            run.log(StepDone(step, 6, 1.0, 2.0, 0.1, 1.0, 3, 2, 0.1, 5))
            run.log(CheckpointSaved(step, "x"))
        run.log(FixedLoss(steps or 1, 1.0, 3))
        run.log(RunJudged("holds", {"a": "holds"}))
        before = run.events.read_bytes()
        if done > steps:
            with pytest.raises(OutputError, match=f"tells of {steps} of the {done} steps") as caught:
                run.rewind_events(done)
            assert caught.value.hint
            assert run.events.read_bytes() == before
        else:
            run.rewind_events(done)
            kept = [(type(event).__name__, getattr(event, "step", None)) for event in run.read_events()]
            both = [(kind, step) for step in range(1, done + 1) for kind in ("StepDone", "CheckpointSaved")]
            assert kept == [("RunStarted", None), *both]


@given(st.data())
@example(None)
@examples(1)
def test_run_folder_log_is_as_it_was_written_or_refused(data: st.DataObject | None) -> None:
    """Whatever byte of a log is changed, added or lost is refused with its line; half a last line alone is no event."""
    with tempfile.TemporaryDirectory() as folder:
        run = _run(Path(folder) / "run")
        run.log(RunStarted("then", "ft train", "id"))
        for step in (1, 2):
            run.log(FixedLoss(0, 1.0, 3))
            run.log(StepDone(step, 6, 1.0, 2.0, 0.1, 1.0, 3, 2, 0.1, 5))
        whole, content = run.read_events(), run.events.read_bytes()
        lines = content.splitlines(keepends=True)
        place = data.draw(st.integers(0, len(content) - 2)) if data else content.index(b'"loss": 2.0') + 8
        digit = (content[place] + (data.draw(st.integers(1, 255)) if data else 1)) % 256
        dropped = data.draw(st.integers(0, 3)) if data else 1
        changed = (
            content[:place] + bytes([digit]) + content[place + 1 :],
            content[:place] + content[place + 1 :],
            content[:place] + b"\n" + content[place:],
            b"".join(lines[:dropped] + lines[dropped + 1 :]),
            b"".join([*lines[:dropped], lines[-1], *lines[dropped:]]),
        )
        for damaged in changed:
            if damaged == content or not damaged.endswith(b"\n"):
                continue
            run.events.write_bytes(damaged)
            for use in (
                run.read_events,
                lambda: run.events_up_to(2),
                lambda: RunFolder(run.path).log(FixedLoss(2, 1.0, 3)),
            ):
                with pytest.raises(OutputError, match=r"events.jsonl:[1-6]: the line is not as it was written"):
                    use()
            assert run.events.read_bytes() == damaged
        run.events.write_bytes(content + content[: place % len(lines[0])])
        assert run.read_events() == whole == run.events_up_to(2)
        run.log(FixedLoss(2, 1.0, 3))
        assert run.read_events() == [*whole, FixedLoss(2, 1.0, 3)]
