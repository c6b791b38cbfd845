"""Laws of merged model files: untouched weights keep their bytes, merged ones are what base and adapter give."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from finetune.errors import ModelError
from finetune.evidence import answering
from finetune.evidence.drift import InferenceRequest
from finetune.export.model_files import DTYPES, INDEX, KINDS, Dtype, ModelFiles
from finetune.export.sources import AdapterWeights, Files, Merged
from finetune.models.shape import weight_files
from finetune.records import AdapterTarget
from finetune_strategies.profiles import examples
from finetune_strategies.scratch import empty_folder
from support.tiny_llamas import open_model
from support.workplace import make_model

TARGET = AdapterTarget(2, 3.0, 0.0, ("a", "b"))
STORED = ("F64", "F32", "F16", "BF16")
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def write_base(folder: Path, kinds: list[str], shards: int) -> Files:
    """Weights a, b (adapted), c (trained whole), d and a mask (untouched), stored in these types, in so many files."""
    dice = np.random.default_rng(len(kinds))
    shapes = {"a.weight": (6, 4), "b.weight": (3, 6), "c.weight": (5,), "d.weight": (2, 3)}
    entries: dict[str, tuple[str, tuple[int, ...], bytes]] = {"mask": ("U8", (3,), bytes((0, 1, 255)))}
    for (name, shape), kind in zip(shapes.items(), kinds, strict=True):
        weight = dice.normal(0, 2, shape)
        upper = (weight.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        raw = upper if kind == "BF16" else weight.astype(_NUMPY[kind])
        entries[name] = (kind, shape, raw.tobytes())
    paths = []
    for number in range(shards):
        header, content = {}, b""
        for name, (kind, shape, raw_bytes) in list(entries.items())[number::shards]:
            place = [len(content), len(content) + len(raw_bytes)]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": place}
            content += raw_bytes
        text = json.dumps(header).encode()
        paths.append(folder / f"base-{number}.safetensors")
        paths[-1].write_bytes(len(text).to_bytes(8, "little") + text + content)
    return Files(paths)


def write_adapter(folder: Path) -> AdapterWeights:
    """An adapter for it."""
    dice = np.random.default_rng(1)
    shapes = {
        "a.lora_A.weight": (2, 4),
        "a.lora_B.weight": (6, 2),
        "b.lora_A.weight": (2, 6),
        "b.lora_B.weight": (3, 2),
    }
    shapes |= {"c.weight": (5,)}
    tensors = {
        f"base_model.model.{name}": dice.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter.safetensors")
    return AdapterWeights(folder / "adapter.safetensors", TARGET)


@given(st.lists(st.sampled_from(STORED), min_size=4, max_size=4), st.integers(1, 3), st.sampled_from([None, *DTYPES]))
@example(["BF16", "F16", "F32", "F64"], 2, None)
def test_merged_files_hold_what_base_and_adapter_give(kinds: list[str], shards: int, dtype: Dtype | None) -> None:
    """In any types and any number of files: untouched weights byte for byte, the others within their type's rounding.

    Whatever is not a float stays; the files are whole for any reader, and say of themselves that nothing differs.
    """
    with empty_folder() as folder:
        base = write_base(folder, kinds, shards)
        source = Merged(base, write_adapter(folder), ())
        wanted = ModelFiles(base, source, dtype)
        (folder / "out").mkdir()
        wanted.write(folder / "out")
        written = Files(weight_files(folder / "out"))
        assert set(written.names()) == set(base.names())
        assert (folder / "out" / INDEX).exists() == (shards > 1)
        assert sum(written.size(name) for name in written.names()) == wanted.total_bytes
        for name in base.names():
            stored = base.kind(name) if dtype is None or name == "mask" else KINDS[dtype]
            assert written.kind(name) == stored
            if name in ("d.weight", "mask") and stored == base.kind(name):
                assert written.raw(name) == base.raw(name)
            elif name != "mask":
                off = np.abs(written.read(name) - source.read(name))
                share = {"F64": 0.0, "F32": 0.0, "F16": 2**-11, "BF16": 2**-8}[stored]
                assert (off <= np.abs(source.read(name)) * share + 2**-25).all()
                assert name == "d.weight" or not np.array_equal(written.read(name), base.read(name))
        for path in weight_files(folder / "out"):
            with safe_open(path, framework="np") as tensors:
                assert tensors.metadata() == {"format": "pt"}
        assert list(wanted.differences(written)) == []


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(1.00390625)  # half way between two: to the even one
@example(1.01171875)
@example(-1e-40)
def test_bfloat16_is_the_nearest(value: float) -> None:
    """What a float is rounded to is a bfloat16, none is nearer, and of two as near it is the even one."""
    from finetune.export.model_files import to_bfloat16

    bits = int(to_bfloat16(np.array([value], np.float32))[0])

    def number(upper: int) -> float:
        return float(np.array([upper << 16], np.uint32).view(np.float32)[0])

    found = number(bits)
    if not np.isfinite(found):
        assert abs(value) > number(0x7F7F)
        return
    sides = [number(bits + step) for step in (-1, 1) if 0 < (bits & 0x7FFF) + step < 0x7F80]
    for other in sides:
        assert abs(value - found) <= abs(value - other)
        assert abs(value - found) < abs(value - other) or bits % 2 == 0


@given(st.sampled_from(["a.weight", "b.weight", "c.weight", "d.weight", "mask"]), st.integers(0, 10**6))
@examples(1 / 2)
def test_a_changed_weight_is_named(name: str, place: int) -> None:
    """Of files in which one byte of one weight is another, exactly that weight is told."""
    with empty_folder() as folder:
        base = write_base(folder, ["F32", "BF16", "F16", "F32"], 1)
        wanted = ModelFiles(base, Merged(base, write_adapter(folder), ()))
        (folder / "out").mkdir()
        wanted.write(folder / "out")
        path = folder / "out" / "model.safetensors"
        content = bytearray(path.read_bytes())
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        begin, end = header[name]["data_offsets"]
        content[8 + int.from_bytes(content[:8], "little") + begin + place % (end - begin)] ^= 4
        path.write_bytes(content)
        assert [words.split()[0] for words in wanted.differences(Files([path]))] == [name]
        save_file({key: value for key, value in load_or_skip(path).items() if key != name}, path)
        assert f"{name} is missing" in list(wanted.differences(Files([path])))


def load_or_skip(path: Path) -> dict[str, Any]:
    """The tensors that NumPy knows the type of."""
    files = Files([path])
    return {name: np.frombuffer(files.raw(name), np.uint8) for name in files.names()}


def test_a_weight_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    """It is named with its size and what to do; in bfloat16 it is written."""
    save_file({"a.weight": np.array([1.0, 7e4], np.float32)}, tmp_path / "w.safetensors")
    files = Files([tmp_path / "w.safetensors"])
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"a\.weight holds 70000.*[\s\S]*bfloat16"):
        ModelFiles(files, files, "float16").write(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    ModelFiles(files, files, "bfloat16").write(tmp_path / "out")
    assert load_or_skip(tmp_path / "out" / "model.safetensors")["a.weight"].nbytes == 4


@pytest.mark.slow
def test_folder_is_asked_in_a_fresh_process_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers is not installed a backend of ours answers: the ids and distributions of its session."""
    monkeypatch.setattr(answering, "find_spec", lambda name: None)
    folder = make_model(tmp_path / "model")
    path, places = ((5, 6, 7), (8,)), ((0, 0), (0, 3), (1, 1))
    asked = InferenceRequest(((3, 4), (9, 10, 11)), (3, 2), (0,), path, places)
    there = answering.ask_folder(folder, asked, otherwise="reference")
    here = answering.ask_session(open_model(folder), asked)
    assert there.ids == here.ids
    assert there.following is not None
    assert here.following is not None
    for one, other, place in zip(there.following, here.following, places, strict=True):
        assert np.array_equal(one.logs, other.logs)
        wanted = open_model(folder).logits(asked.sequence(place))[-1]
        assert np.abs(one.logs - (wanted - np.log(np.exp(wanted).sum()))).max() < 1e-5
