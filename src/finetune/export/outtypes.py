"""The types in which GGUF keeps weights: what each takes and how near it comes, and which of them a tensor gets.

Sources: `llama-quant.cpp` and `convert_hf_to_gguf.py` of llama.cpp, `GGML_QUANT_SIZES` of gguf-py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Outtype = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
OUTTYPES: tuple[Outtype, ...] = get_args(Outtype)
QUANTISED: tuple[Outtype, ...] = ("q8_0", "q6_k", "q5_k_m", "q4_k_m")
FILE_TYPES: dict[Outtype, int] = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bf16": 32}
"""The number by which a file says of which type most of it is."""
Storage = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k"]


@dataclass(frozen=True, slots=True)
class Block:
    """How a type keeps weights: so many of a row together, in so many bytes."""

    weights: int
    bytes: int


BLOCKS: dict[Storage, Block] = {
    "f32": Block(1, 4),
    "f16": Block(1, 2),
    "bf16": Block(1, 2),
    "q8_0": Block(32, 34),
    "q6_k": Block(256, 210),
    "q5_k": Block(256, 176),
    "q5_1": Block(32, 24),
    "q5_0": Block(32, 22),
    "q4_k": Block(256, 144),
}
BY_LLAMA_CPP: tuple[Storage, ...] = ("q6_k", "q5_k", "q5_1", "q5_0", "q4_k")
"""Types that only llama.cpp's own quantiser makes; gguf-py makes the others too, the same bytes."""
_MOSTLY: dict[Outtype, Storage] = {"q6_k": "q6_k", "q5_k_m": "q5_k", "q4_k_m": "q4_k"}
_SMALLER: dict[Storage, Storage] = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What takes the place of a type where a row is no multiple of its block."""


def choose_storage(place: str, shape: Sequence[int], outtype: Outtype, layers: int, *, is_head: bool) -> Storage:
    """The type of one tensor in a file.

    Norms, biases and positions stay in full. In q4_k_m and q5_k_m some layers' values and down projections get more
    bits, and the head gets six: as llama-quantize has it, but for its exception for one size of 80 layers.

    Args:
        place: its name in GGUF.
        layers: how many the model has.
        is_head: whether it is the head, or a table of embeddings that is the head too.
    """
    full = len(shape) < 2 or place.endswith("_norm.weight") or place.startswith("position_embd")
    if full or not place.endswith((".weight", ".lora_a", ".lora_b")):
        return "f32"
    wanted: Storage
    if outtype in ("f32", "f16", "bf16", "q8_0"):
        wanted = outtype
    elif is_head:
        wanted = "q6_k" if shape[-1] % BLOCKS["q6_k"].weights == 0 else "q8_0"
    else:
        wanted = _of_layer(place, outtype, layers)
    if shape[-1] % BLOCKS[wanted].weights:
        wanted = _SMALLER.get(wanted, "f16")
    return "f16" if shape[-1] % BLOCKS[wanted].weights else wanted


def _of_layer(place: str, outtype: Outtype, layers: int) -> Storage:
    mostly = _MOSTLY[outtype]
    found = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down|attn_qkv)\.weight", place)
    if found is None or mostly == "q6_k":
        return mostly
    if found[2] == "attn_qkv":
        return "q5_k" if mostly == "q4_k" else "q6_k"
    layer, eighth = int(found[1]), layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return "q6_k" if more else mostly
