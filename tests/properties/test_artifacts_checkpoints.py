"""Laws of checkpoints: only whole ones exist, the newest stay, and a changed byte or another run is refused."""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune.errors import RefusedError, StorageError
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune_strategies.profiles import examples
from support.disks import full_after

IDENTITY = {"plan": "rank: 4\n", "base": "reference-llama"}
OWNER = Owner(IDENTITY, {"torch": "2.13", "cores": 2})
MANIFEST = "checkpoint.json"
FOREIGN = (
    "notes.txt",
    "step-7/checkpoint.json",
    "step-00000012.bak/checkpoint.json",
    "step-000000012/checkpoint.json",
    "Step-00000012/checkpoint.json",
    "step-0000001x/checkpoint.json",
    "best/state.bin",
    "step-00000013",
    ".step-00000014/checkpoint.json",
    "step--0000001/checkpoint.json",
)


class StoreMachine(RuleBasedStateMachine):
    """A store next to a dictionary that says what it must hold."""

    @initialize(keep=st.integers(1, 3))
    def begin(self, keep: int) -> None:
        """A store in a folder that does not exist yet."""
        self.root = Path(tempfile.mkdtemp())
        self.store = CheckpointStore(self.root / "checkpoints", keep=keep)
        # Looks into the same folder without keeping anything in use.
        self.reader = CheckpointStore(self.root / "checkpoints")
        self.whole: dict[int, bytes] = {}
        self.best: dict[int, int | None] = {}
        self.used: set[int] = set()
        self.changed: set[int] = set()
        self.foreign: dict[str, bytes] = {}
        self.last = 0
        assert self.store.newest() is None

    def teardown(self) -> None:
        """Leave nothing."""
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def path(self, step: int) -> Path:
        """Where a checkpoint lies."""
        return self.store.folder / f"step-{step:08d}"

    def next_step(self, ahead: int) -> int:
        """A later step; the places where the number of digits grows come early."""
        return next(edge for edge in (9, 10, 99, 100, 9_900, 10_000, self.last + ahead) if edge > self.last)

    def rotate(self) -> None:
        """What must stay: the newest few, what was the best when each of them was written, and what is in use."""
        newest = sorted(self.whole)[-self.store.keep :]
        stay = {*newest, *(self.best[step] for step in newest), *self.used}
        self.whole = {step: content for step, content in self.whole.items() if step in stay}
        self.changed &= set(self.whole)

    @rule(ahead=st.integers(1, 10_000), content=st.binary(min_size=1, max_size=9), data=st.data())
    def save(self, ahead: int, content: bytes, data: st.DataObject) -> None:
        """A saved checkpoint is there, and of the older ones those that must be."""
        step = self.last = self.next_step(ahead)
        best = data.draw(st.sampled_from([None, step, *self.whole]))

        def write(folder: Path) -> None:
            (folder / "deep").mkdir()
            (folder / "deep" / "state.bin").write_bytes(content)
            (folder / "empty").write_bytes(b"")
            # Older ones go only when the new one is safe.
            assert self.store.steps() == sorted(self.whole)

        assert self.store.save(step, write, OWNER, best=best) == self.path(step)
        self.whole[step], self.best[step] = content, best
        self.rotate()

    @precondition(lambda self: set(self.whole) - self.changed)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        """A checkpoint that was opened stays until it is let go."""
        step = data.draw(st.sampled_from(sorted(set(self.whole) - self.changed)))
        self.store.open(step, IDENTITY)
        self.used.add(step)

    @rule()
    def let_go(self) -> None:
        """What was in use stays only if it must for another reason."""
        self.store.release()
        self.used.clear()
        self.rotate()

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), told=st.sampled_from([{"torch": "2.13"}, {"torch": "3", "cores": 2}, {}, {"new": 1}]))
    def tell_changes(self, data: st.DataObject, told: dict[str, Any]) -> None:
        """What is not as it was when a checkpoint was written is told, each with both values, and nothing else."""
        step = data.draw(st.sampled_from(sorted(self.whole)))
        keys = {key for key in {*told, *OWNER.told} if told.get(key) != OWNER.told.get(key)}
        found = self.store.changes(step, told)
        assert sorted(found) == sorted(f"{key}: {OWNER.told.get(key)!r} -> {told.get(key)!r}" for key in keys)

    @rule(ahead=st.integers(1, 100))
    def save_on_a_full_disk(self, ahead: int) -> None:
        """A checkpoint that does not fit changes nothing."""
        with full_after(5_000), pytest.raises(StorageError):
            self.store.save(
                self.next_step(ahead), lambda folder: (folder / "state.bin").write_bytes(b"x" * 9_999) and None, OWNER
            )

    @precondition(lambda self: self.whole)
    @rule()
    def save_again(self) -> None:
        """A step that is already kept is not written again."""
        self.store.save(max(self.whole), lambda folder: pytest.fail("written twice"), OWNER)

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), mask=st.integers(1, 255))
    def flip(self, data: st.DataObject, mask: int) -> None:
        """One changed byte anywhere, the manifest included, and the checkpoint is refused by name."""
        step = data.draw(st.sampled_from(sorted(self.whole)))
        files = sorted(file for file in self.path(step).rglob("*") if file.is_file() and file.stat().st_size)
        file = data.draw(st.sampled_from(files))
        old = file.read_bytes()
        place = data.draw(st.integers(0, len(old) - 1))
        new = old[:place] + bytes([old[place] ^ mask]) + old[place + 1 :]
        if file.name == MANIFEST and _means_the_same(old, new):
            return
        file.write_bytes(new)
        with pytest.raises(RefusedError, match=f"step-{step:08d}") as caught:
            self.reader.open(step, IDENTITY)
        assert caught.value.hint
        file.write_bytes(old)

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), kind=st.sampled_from(["truncate", "remove", "add", "rename"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        """A file cut short, gone, new or under another name: refused from now on, the others not."""
        step = data.draw(st.sampled_from(sorted(self.whole)))
        state = self.path(step) / "deep" / "state.bin"
        if kind == "add" or not state.exists():
            (self.path(step) / "new").write_bytes(b"")
        elif kind == "truncate":
            state.write_bytes(state.read_bytes()[:-1])
        else:
            state.unlink() if kind == "remove" else state.rename(state.with_name("state.ban"))
        self.changed.add(step)

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), repeat=st.booleans())
    def tear(self, data: st.DataObject, repeat: bool) -> None:
        """Without its manifest a checkpoint does not exist, and its step can be saved again."""
        step = data.draw(st.sampled_from(sorted(self.whole)))
        (self.path(step) / MANIFEST).unlink()
        del self.whole[step]
        self.changed.discard(step)
        self.used.discard(step)
        if repeat and step > max(self.whole, default=0):
            self.store.save(step, lambda folder: (folder / "deep").mkdir(), OWNER, best=self.best[step])
            assert self.store.newest() == step
            shutil.rmtree(self.path(step))

    @precondition(lambda self: self.whole)
    @rule(name=st.sampled_from(FOREIGN))
    def plant(self, name: str) -> None:
        """What is not ours is neither listed nor touched."""
        path = self.store.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
        self.foreign[name] = b"{}"

    @precondition(lambda self: self.whole)
    @rule(key=st.sampled_from(sorted(IDENTITY)))
    def open_as_another(self, key: str) -> None:
        """A checkpoint of other settings is refused, and told are the setting and both its values."""
        step = max(set(self.whole) - self.changed, default=None)
        if step is not None:
            with pytest.raises(RefusedError) as caught:
                self.reader.open(step, {**IDENTITY, key: "other"})
            assert f"{key}: {IDENTITY[key]!r} -> 'other'" in caught.value.message
            with pytest.raises(RefusedError, match="None -> 1"):
                self.reader.open(step, {**IDENTITY, "more": 1})

    @invariant()
    def agrees(self) -> None:
        """Store and dictionary agree; what is whole opens, what is changed does not, and nothing is half written."""
        if not hasattr(self, "store"):
            return
        assert self.store.steps() == sorted(self.whole)
        assert self.store.newest() == max(self.whole, default=None)
        for step, content in self.whole.items():
            if step in self.changed:
                with pytest.raises(RefusedError):
                    self.reader.open(step, IDENTITY)
            else:
                assert (self.reader.open(step, IDENTITY) / "deep" / "state.bin").read_bytes() == content
        with pytest.raises(RefusedError):
            self.reader.open(max(self.whole, default=0) + 1, IDENTITY)
        assert not list(self.root.rglob("*.part"))
        assert all((self.store.folder / name).read_bytes() == content for name, content in self.foreign.items())


StoreMachine.TestCase.settings = examples(1 / 3)
test_checkpoints_store_agrees_with_its_model = StoreMachine.TestCase


def _means_the_same(old: bytes, new: bytes) -> bool:
    """Whether a changed byte is only other white space between the words of the JSON."""
    try:
        return bool(json.loads(old) == json.loads(new))
    except ValueError:
        return False


def _save(store: CheckpointStore, step: int) -> None:
    store.save(step, lambda folder: (folder / "state.bin").write_text(f"{step}") and None, OWNER)


def test_checkpoints_nothing_goes_while_the_best_is_unknown(tmp_path: Path) -> None:
    """A newest checkpoint whose manifest is damaged may have named any as the best: none is removed until it is old."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step, best in ((1, 1), (2, 1), (3, 1)):
        store.save(step, lambda place: (place / "a").write_text("a") and None, OWNER, best=best)
    assert store.steps() == [1, 2, 3]
    (store.folder / "step-00000003" / MANIFEST).write_text("{")
    store.release()
    assert store.steps() == [1, 2, 3]
    for step, left in ((4, [1, 2, 3, 4]), (5, [1, 4, 5])):
        store.save(step, lambda place: (place / "a").write_text("a") and None, OWNER, best=1)
        assert store.steps() == left


def test_checkpoints_manifest_is_written_last(tmp_path: Path) -> None:
    """While the state is being written there is no manifest, and until all is there the folder has not its name."""
    store = CheckpointStore(tmp_path / "checkpoints")

    def write(folder: Path) -> None:
        assert not (folder / MANIFEST).exists()
        assert store.steps() == []
        (folder / "state.bin").write_text("x")

    listed = json.loads((store.save(3, write, OWNER) / MANIFEST).read_text())
    assert [file["path"] for file in listed["files"]] == ["state.bin"]


def test_checkpoints_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    """Whichever byte of a manifest is another, in the best step or in what may differ, the checkpoint is refused."""
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.save(12, lambda place: (place / "a").write_text("a") and None, OWNER, best=12) / MANIFEST
    old = path.read_bytes()
    assert len(old) > 300
    for place in range(len(old)):
        new = old[:place] + bytes([old[place] ^ 1]) + old[place + 1 :]
        if not _means_the_same(old, new):
            path.write_bytes(new)
            with pytest.raises(RefusedError):
                store.open(12, IDENTITY)


WRITER = """
import sys
from pathlib import Path
from finetune.run.checkpoints import CheckpointStore, Owner
store = CheckpointStore(Path(sys.argv[1]), keep=2)
for step in range(int(sys.argv[2]), 10**8):
    def write(folder):
        with (folder / "state.bin").open("w") as file:
            for _ in range(64):
                file.write(f"{step:08d}" * 512)
                file.flush()
    store.save(step, write, Owner({"plan": "rank: 4\\n", "base": "reference-llama"}, {}))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_checkpoints_killed_writer_leaves_only_whole_ones(tmp_path: Path) -> None:
    """A process killed at any moment leaves whole checkpoints only: up to the last it told of, or the one after."""
    folder, dice, first = tmp_path / "checkpoints", random.Random(0), 9_997
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(first)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            told = [int(writer.stdout.readline())]
            time.sleep(dice.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
            told += [int(line) for line in writer.stdout.read().split()]
        assert writer.returncode == -signal.SIGKILL
        store = CheckpointStore(folder, keep=2)
        steps = store.steps()
        assert steps[-1] - told[-1] in (0, 1)
        assert len(steps) <= 3
        assert all(later - earlier == 1 for earlier, later in itertools.pairwise(steps))
        for step in steps:
            assert (store.open(step, IDENTITY) / "state.bin").read_text() == f"{step:08d}" * 512 * 64
        first = steps[-1] + 1
    store.save(first, lambda path: (path / "state.bin").write_text("x") and None, OWNER)
    store.release()
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in (first - 1, first)]


def test_checkpoints_leftovers_of_a_killed_writer_go_at_the_next_save(tmp_path: Path) -> None:
    """What a killed process had half written is removed by the next one, and nothing else is."""
    store = CheckpointStore(tmp_path / "checkpoints")
    torn = store.folder / ".step-00000003.77.part"
    torn.mkdir(parents=True)
    (torn / "state.bin").write_text("half")
    (store.folder / "notes.part").write_text("mine")
    _save(store, 4)
    assert sorted(path.name for path in store.folder.iterdir()) == ["notes.part", "step-00000004"]
