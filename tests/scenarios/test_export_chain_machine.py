"""The way from a run to what is deployed, told as a story: merged, taken off, exported, requantised, killed, spoilt.

Whatever lies at a final path is whole and computes what the trainer computes; what is not is called so by name; and
nothing that the run or its base was made of is ever another. All is done by real processes, through a subject's door.
"""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

import gguf
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune.verify.stateful.deaths import CODES, Death
from finetune.verify.stateful.lives import Ending, Task
from finetune.verify.stateful.training import content, spoil
from finetune_strategies.profiles import examples
from finetune_strategies.scratch import lasting_folder
from support.our_exports import OurExports
from support.subjects import deaths
from support.tiny_runs import KINDS, tiny_model
from support.workplace import QUICK, make_data

pytestmark = pytest.mark.tier2
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
REFUSED = 3
CHANGES = 18
"""As many as merging makes to the run's folder."""
BY_BACKEND = {
    "reference": ("dora on llama", "lora", "modules to save", "rank-stabilized"),
    "torch": tuple(kind for kind in KINDS if kind != "whole model"),
}
"""Which kinds of runs each backend can make."""


@cache
def subject(backend: str) -> OurExports:
    """Our own trainer, and its fork server, for this session."""
    ours = OurExports(backend)
    atexit.register(ours.close)
    return ours


@cache
def finished(backend: str, kind: str) -> Path:
    """A place with a model, its data and a finished run of this kind."""
    family, chosen = KINDS[kind]
    place = lasting_folder("exports") / f"{backend} {kind}"
    model, data = tiny_model(place / "model", family), make_data(place / "rows.jsonl", 9)
    chosen = {**QUICK, "evaluation.questions": 9, "training.learning_rate": 0.02, **chosen}
    task = Task(model, data, {key: value for key, value in chosen.items() if key != "backend"})
    ending = subject(backend).train(task, place / "run")
    assert ending.code in (0, 1), ending.stderr
    assert (place / "run" / "run.json").exists(), ending.stderr
    return place


class ExportChain(RuleBasedStateMachine):
    """One finished run, and what is made of it."""

    backend: ClassVar = "reference"

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """A run is finished, and nothing has been made of it yet."""
        self.take(data.draw(st.sampled_from(BY_BACKEND[self.backend]), label="kind"))

    def take(self, kind: str) -> None:
        """A copy of the run of this kind, whose base is everybody's."""
        self.subject: OurExports = subject(self.backend)
        self.place = finished(self.backend, kind)
        self.kind = kind
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "run"
        shutil.copytree(self.place / "run", self.folder)
        self.sources = self.all_sources()
        self.there: set[str] = set()
        self.spoilt: dict[str, str] = {}
        # What takes seconds and shows nothing new a second time.
        self.tried: set[str] = set()

    def teardown(self) -> None:
        """Leave nothing."""
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def all_sources(self) -> dict[str, bytes]:
        """Every byte that the run and its base are made of."""
        made = ("merged/", "gguf/", ".")
        own = {name: found for name, found in content(self.folder).items() if not name.startswith(made)}
        own.pop("equivalence.json", None)
        return own | {f"base {name}": found for name, found in content(self.place / "model").items()}

    def path(self, name: str) -> Path:
        """Where a thing comes to lie."""
        return self.folder / ("merged" if name == "merged" else f"gguf/run-{name.removeprefix('gguf-')}.gguf")

    def left(self) -> list[str]:
        """What is half written."""
        return sorted(path.name for path in self.folder.rglob(".*.part"))

    def ended(self, name: str, ending: Ending, death: Death | None) -> None:
        """A process that was to make something has ended, perhaps before it had."""
        assert "Traceback" not in ending.stderr, ending.stderr
        if ending.code == 0:
            assert self.path(name).exists()
            assert self.left() == []
        else:
            assert death is not None, ending.stderr
            codes = {CODES[death.by], 1} if death.by == "interrupt" else {CODES[death.by]}
            assert ending.code in codes, ending.stderr
            if death.by in ("full", "interrupt"):
                assert self.left() == []
            if death.by == "full":
                assert "cannot write" in ending.stderr or "ended with code" in ending.stderr
        if self.path(name).exists():
            self.there.add(name)

    @precondition(lambda self: "merged" not in self.there)
    @rule(death=st.none() | deaths(CHANGES))
    def merge(self, death: Death | None) -> None:
        """Fold the adapter into its base, or die before it is done."""
        self.ended("merged", self.subject.merge(self.folder, death), death)

    @rule(data=st.data(), death=st.none() | deaths(6))
    def export(self, data: st.DataObject, death: Death | None) -> None:
        """Write the run as GGUF of a type that is not there yet, or die before it is done."""
        missing = [outtype for outtype in OUTTYPES if f"gguf-{outtype}" not in self.there]
        if missing:
            self.make(data.draw(st.sampled_from(missing), label="outtype"), death)

    def make(self, outtype: str, death: Death | None = None) -> None:
        """Write the run as GGUF of this type."""
        self.ended(f"gguf-{outtype}", self.subject.export(self.folder, outtype, death=death), death)

    @precondition(lambda self: self.there and "again" not in self.tried)
    @rule(data=st.data())
    def make_again(self, data: st.DataObject) -> None:
        """What is there already is never written over, whole or spoilt."""
        self.tried.add("again")
        name = data.draw(st.sampled_from(sorted(self.there)), label="what")
        before = content(self.folder)
        outtype = name.removeprefix("gguf-")
        ending = self.subject.merge(self.folder) if name == "merged" else self.subject.export(self.folder, outtype)
        assert (ending.code, "exists already" in ending.stderr) == (REFUSED, True), ending.stderr
        assert content(self.folder) == before

    @precondition(lambda self: "off" not in self.tried)
    @rule()
    def take_off(self) -> None:
        """Folding the adapter in and taking it off again leaves the base, bit for bit, and it was another before."""
        self.tried.add("off")
        ending = self.subject.take_off(self.folder)
        assert ending.code == 0, ending.stderr
        assert json.loads(ending.answer) == {"kept": True, "base": True, "another": True}

    @precondition(lambda self: "alone" not in self.tried)
    @rule(outtype=st.sampled_from(OUTTYPES))
    def export_alone(self, outtype: str) -> None:
        """The adapter alone, on the base in llama.cpp, is what was trained; what cannot stand alone is refused."""
        self.tried.add("alone")
        output = self.root / f"adapter-{outtype}.gguf"
        ending = self.subject.export(self.folder, outtype, output=output, alone=True)
        if self.kind.startswith("dora") or self.kind == "modules to save":
            assert (ending.code, "alone cannot hold" in ending.stderr) == (REFUSED, True), ending.stderr
        else:
            assert ending.code == 0, ending.stderr
        assert output.exists() == (ending.code == 0)

    @precondition(lambda self: {"gguf-f32", "merged"} & self.whole() and "two ways" not in self.tried)
    @rule(outtype=st.sampled_from(OUTTYPES[1:]))
    def go_two_ways(self, outtype: str) -> None:
        """By way of the merged folder, or of the f32 file requantised, the same tensors come out as at once."""
        self.tried.add("two ways")
        name = f"gguf-{outtype}"
        if name not in self.there:
            self.make(outtype)
        if name in self.spoilt:
            return
        direct = gguf.GGUFReader(self.path(name)).tensors
        if "merged" in self.whole():
            output = self.root / f"by way of merged {outtype}.gguf"
            ending = self.subject.export(self.path("merged"), outtype, output=output)
            assert ending.code == 0, ending.stderr
            through = gguf.GGUFReader(output).tensors
            output.unlink()
            assert [one.name for one in through] == [one.name for one in direct]
            assert [one.data.tobytes() for one in through] == [one.data.tobytes() for one in direct]
        if "gguf-f32" in self.whole():
            full = {tensor.name: tensor.data for tensor in gguf.GGUFReader(self.path("gguf-f32")).tensors}
            assert full.keys() == {tensor.name for tensor in direct}
            for tensor in direct:
                assert gguf.quantize(full[tensor.name], tensor.tensor_type).tobytes() == tensor.data.tobytes()

    def whole(self) -> set[str]:
        """What is there and was not spoilt."""
        return self.there - self.spoilt.keys()

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), where=st.integers(0, 10**6), how=st.sampled_from(["flip", "cut"]))
    def spoil(self, data: st.DataObject, where: int, how: str) -> None:
        """A bit of a weight changes, or the end of a file is lost."""
        name = data.draw(st.sampled_from(sorted(self.whole())), label="what")
        file = self.path(name) / "model.safetensors" if name == "merged" else self.path(name)
        if how == "flip":
            start, length = largest_weight(file)
            # The last byte of a number, or of a block of q8_0: in others a rounded weight may be as good as it was.
            one = {"gguf-q8_0": 34, "gguf-f16": 2, "gguf-bf16": 2}.get(name, 4)
            numbers = length // one
            # Not the first row, which is that of padding: of nothing but zeros a block keeps nothing.
            spoil_byte(file, start + (numbers // 2 + where % (numbers // 2) + 1) * one - 1)
        else:
            size = file.stat().st_size
            spoil(file, size - 64 - where % (size // 2), "cut")
        self.spoilt[name] = file.name

    @precondition(lambda self: self.spoilt)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Do as the hint says."""
        name = data.draw(st.sampled_from(sorted(self.spoilt)), label="what")
        path = self.path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        del self.spoilt[name]
        self.there.discard(name)
        self.tried -= {"compare"}

    @precondition(lambda self: self.there)
    @rule(data=st.data(), death=st.none() | deaths(4))
    def compare(self, data: st.DataObject, death: Death | None) -> None:
        """Each is held to the trainer: what is whole passes, and what was spoilt fails, by its name."""
        name = data.draw(st.sampled_from(sorted(self.there)), label="what")
        ending = self.subject.compare(self.folder, [name], death)
        assert "Traceback" not in ending.stderr, ending.stderr
        if death is not None and ending.code in {CODES[death.by], 130} and not ending.answer:
            return
        assert ending.code == (1 if name in self.spoilt else 0), ending.stderr
        [_, row] = json.loads(ending.answer)["paths"]
        assert row["path"] == name
        if name in self.spoilt:
            assert row["outcome"] == "failed"
            assert name in row["reason"] or self.path(name).name in row["reason"]
        else:
            assert row["outcome"] == "passed", row
            assert row["drift"]["questions"] >= 8
            assert row["drift"]["mismatches"] == [] or name not in ("merged", "gguf-f32")
        assert json.loads((self.folder / "equivalence.json").read_text(encoding="utf-8")) == json.loads(ending.answer)

    @invariant()
    def at_every_moment(self) -> None:
        """What lies at a final path is what was made, nothing else does, and the sources are as they were."""
        if not hasattr(self, "root"):
            return
        found = {f"gguf-{outtype}" for outtype in OUTTYPES if self.path(f"gguf-{outtype}").exists()}
        assert found | ({"merged"} if self.path("merged").exists() else set()) == self.there
        assert self.all_sources() == self.sources
        assert self.subject.look(self.folder).damaged == ()


def largest_weight(file: Path) -> tuple[int, int]:
    """Where the largest tensor of a file lies, and how long it is."""
    if file.suffix == ".gguf":
        tensor = max(gguf.GGUFReader(file).tensors, key=lambda one: one.n_bytes)
        return int(tensor.data_offset), int(tensor.n_bytes)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    begin, end = max((entry["data_offsets"] for entry in header.values()), key=lambda place: place[1] - place[0])
    return 8 + length + begin, end - begin


def spoil_byte(file: Path, place: int) -> None:
    """Change a high bit of a byte."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 0x20
    file.write_bytes(raw)


class Chosen:
    """Draws what a told story says."""

    def __init__(self, choice: str) -> None:
        self.choice = choice

    def draw(self, strategy: Any, label: str = "") -> str:
        """The choice."""
        del strategy, label
        return self.choice


def test_export_chain_told_from_end_to_end() -> None:
    """One story in which everything happens: made both ways, taken off, alone, spoilt, told by name, removed, again."""
    story = ExportChain()
    story.take("rank-stabilized")
    story.export(Chosen("q8_0"), Death(2, "kill"))
    assert story.there == set()
    story.merge(None)
    assert story.left() == []
    for outtype in ("f32", "q8_0"):
        story.export(Chosen(outtype), None)
    story.go_two_ways("q8_0")
    story.make_again(Chosen("merged"))
    story.take_off()
    story.export_alone("f32")
    story.compare(Chosen("gguf-q8_0"), None)
    for name, how in (("merged", "flip"), ("gguf-q8_0", "flip"), ("gguf-f32", "cut")):
        story.spoil(Chosen(name), 4321, how)
        story.compare(Chosen(name), None)
        story.remove(Chosen(name))
        story.at_every_moment()
    assert story.there == set()
    story.export(Chosen("q8_0"), None)
    assert story.there == {"gguf-q8_0"}
    story.teardown()


HURRIED = settings.get_current_profile_name().startswith("fast")
ExportChain.TestCase.settings = settings(examples(1 / 24), stateful_step_count=settings().stateful_step_count // 2)
hurried = pytest.mark.skipif(HURRIED, reason="takes a minute: HYPOTHESIS_PROFILE=ci has time for it")
test_export_chain_hands_on_what_was_trained = hurried(ExportChain.TestCase)


@pytest.mark.parametrize("by", ["power", "full"])
def test_merging_survives_a_death_at_every_change(by: Any) -> None:
    """At whichever change merging dies, nothing or the whole is at its place, and it can be done again.

    In a hurry only two are tried, before the model that was written is asked.
    """
    died = 0
    for after in (1, 6) if HURRIED else range(CHANGES):
        story = ExportChain()
        story.take("lora")
        story.merge(Death(after, by))
        died += "merged" not in story.there
        story.at_every_moment()
        story.teardown()
    assert died >= 2


class TorchChain(ExportChain):
    """The same with torch, on models of several families."""

    backend: ClassVar = "torch"


TorchChain.TestCase.settings = examples(1 / 25)
test_export_chain_with_torch = hurried(TorchChain.TestCase)
