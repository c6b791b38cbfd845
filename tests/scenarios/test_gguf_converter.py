"""GGUF files are, tensor by tensor and key by key, what llama.cpp's own converter writes of the same models."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

import gguf

from finetune.export.gguf import plan_whole
from finetune.export.outtypes import Outtype
from finetune.export.write import write_gguf
from finetune_strategies.scratch import lasting_folder
from support.gguf_models import CONFIGS, exportable, give_tokenizer, make_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / ".peers" / "llama.cpp").exists(), reason="llama.cpp's converter is not here: make converter"
)
OUTTYPES: tuple[Outtype, ...] = ("f32", "f16", "bf16", "q8_0")
"""Those that theirs writes."""
WITHOUT_TOKENIZER = {"mistral", "gemma", "gemma2", "gemma3", "phi3", "phi3, long", "phi3, half turned"}
"""Of these theirs reads a tokenizer from SentencePiece's own file, which a fine-tuned model need not have."""
ROWS, TOKENS = 640, 600
ALONE = {
    # Theirs leaves these to llama.cpp's defaults, which are the same.
    "add_bos_token",
    "add_eos_token",
    "key_length",
    "value_length",
    "dimension_count",
    "vocab_size",
    "sliding_window_pattern",
    "freq_base",
}
"""What ours says and theirs does not, by the last part of the key."""
NAMING = ("general.name", "general.basename", "general.version")
"""Theirs makes these of the folder's name."""
OTHERWISE = {
    ("llama.context_length", "mistral, window"): "llama.cpp has no window for this family; ours ends where it would",
    ("gpt2.feed_forward_length", "gpt2"): "theirs takes four times the width, whatever n_inner says",
    ("general.size_label", "gemma3"): "theirs leaves out rows for which there is no token",
}
"""Where both differ, and why."""


@cache
def converted() -> dict[str, Path]:
    """A folder for each model, with their file of each type in it; all were converted in one process."""
    root, asked, folders = lasting_folder("converter"), [], {}
    for number, kind in enumerate(CONFIGS):
        folders[kind] = folder = make_model(kind, root / f"model-{number}")
        pre = give_tokenizer(kind, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # Their converter of GPT-2 asks for the older of two names.
        older = {"n_ctx": config["n_positions"]} if kind == "gpt2" else {}
        (folder / "config.json").write_text(json.dumps(config | older), encoding="utf-8")
        for outtype in OUTTYPES:
            file = str(folder / f"theirs-{outtype}.gguf")
            name = "" if kind in WITHOUT_TOKENIZER else pre
            asked.append({"model": str(folder), "outtype": outtype, "file": file, "pre": name})
    lines = "".join(json.dumps(request) + "\n" for request in asked)
    program = [sys.executable, str(ROOT / "bench" / "convert_llama_cpp.py")]
    done = subprocess.run(program, input=lines, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return folders


@pytest.mark.parametrize("kind", CONFIGS)
def test_gguf_is_what_llama_cpps_converter_writes(kind: str) -> None:
    """Of 16 models of nine families, in each of 4 types: the same tensors, byte for byte, and the same keys."""
    assert (len(CONFIGS), len(OUTTYPES)) == (16, 4)
    folder = converted()[kind]
    for outtype in OUTTYPES:
        path = folder / f"ours-{outtype}.gguf"
        write_gguf(plan_whole(exportable(folder), outtype), path)
        ours, theirs = gguf.GGUFReader(path), gguf.GGUFReader(folder / f"theirs-{outtype}.gguf")
        assert not differing_tensors(ours, theirs, kind)
        assert not differing_keys(ours, theirs, kind)


def differing_tensors(ours: Any, theirs: Any, kind: str) -> list[str]:
    """Names of tensors that are not the same in both."""
    own, other = ({tensor.name: tensor for tensor in file.tensors} for file in (ours, theirs))
    assert len(own) > 10
    return [
        name
        for name in sorted(own.keys() | other.keys())
        if name not in own or name not in other or not same_tensor(own[name], other[name], kind)
    ]


def same_tensor(own: Any, other: Any, kind: str) -> bool:
    """Whether type, shape and bytes are the same."""
    shapes = [list(tensor.shape) for tensor in (own, other)]
    data = own.data
    if (kind, own.name) == ("gemma3", "token_embd.weight"):
        # Theirs leaves out rows for which there is no token.
        assert shapes[0][1] >= shapes[1][1]
        data, shapes[0] = data[: shapes[1][1]], shapes[1]
    return own.tensor_type == other.tensor_type and shapes[0] == shapes[1] and data.tobytes() == other.data.tobytes()


def differing_keys(ours: Any, theirs: Any, kind: str) -> list[str]:
    """What is said otherwise, but for what is known to be."""
    own, other = (
        {name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF.")}
        for file in (ours, theirs)
    )
    if kind in WITHOUT_TOKENIZER:
        own, other = ({name: said for name, said in file.items() if "tokenizer" not in name} for file in (own, other))
    else:
        # Rows without a token: theirs asks transformers, which puts one there that tokenizer.json does not have.
        for file in (own, other):
            assert len(file["tokenizer.ggml.tokens"]) == len(file["tokenizer.ggml.token_type"]) == ROWS
            for name in ("tokens", "token_type"):
                file[f"tokenizer.ggml.{name}"] = file[f"tokenizer.ggml.{name}"][:TOKENS]
    assert len(other) > 12
    return [
        f"{name}: {own.get(name)!s:.60} and {other.get(name)!s:.60}"
        for name in sorted(own.keys() | other.keys())
        if own.get(name) != other.get(name)
        and name not in NAMING
        and (name, kind) not in OTHERWISE
        and not (name not in other and name.rsplit(".", 1)[-1] in ALONE)
    ]
