"""Models to write as GGUF, with settings and tokenizers that are spelt in several ways."""

from collections.abc import Mapping
from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune.records import DEFAULT_KIND
from finetune_strategies.cases.learned import MODELS, ONE_ROW, WIDE, Learned
from finetune_strategies.cases.rows import TINY, one_of
from finetune_strategies.recipes import ModelRecipe, Recipe

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_GPT2, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cut(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


CUTS: Mapping[str, tuple[dict[str, Any], str]] = {
    "GPT-2's": (_GPT2, "gpt-2"),
    "Qwen2's": (_cut(_QWEN2), "qwen2"),
    "SmolLM's": ({"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]}, "smollm"),
    "nobody's": (_cut(r"\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]"), ""),
    "nearly Qwen2's": (_cut(_QWEN2.replace(r"\p{N}|", r"\p{N}{1,2}|", 1)), ""),
}


class Written(Recipe):
    """A model that is written as GGUF."""

    model: ModelRecipe = TINY


WRITTEN = st.builds(Written, model=st.sampled_from([WIDE, TINY, ModelRecipe(heads=6, kv_heads=2, head_size=6)]))
EXPORT_ADAPTED = st.builds(Learned, rows=ONE_ROW, kind=st.sampled_from(["of two layers", DEFAULT_KIND]))


class Turned(Recipe):
    """The base of the rotation and its scaling."""

    theta: Annotated[float, Field(gt=1)]
    factor: Annotated[float, Field(ge=1)]
    kind: Annotated[str, Field(pattern="^(default|linear|yarn|llama3)$")]
    older: bool


EXPORT_ROPE = st.builds(
    Turned,
    theta=st.sampled_from([5e5, 1e4]),
    factor=st.sampled_from([8.0, 2.0]),
    kind=st.sampled_from(["linear", "llama3", "yarn", "default"]),
    older=st.booleans(),
)


class Words(Recipe):
    """How many rows the table has beyond the tokens, and how many tokens there are beyond its rows.

    `named`: three of the spare rows get tokens that llama.cpp knows, or does not, by their names.
    """

    spare: Annotated[int, Field(ge=0, le=9)] = 0
    excess: Annotated[int, Field(ge=0, le=3)] = 0
    named: bool = False


EXPORT_VOCABULARY = st.sampled_from(
    [Words(), Words(spare=7), Words(excess=1), Words(spare=2), Words(spare=4, named=True)]
)


class Cut(Recipe):
    """How text is cut before it is merged."""

    by: Annotated[str, Field(pattern=one_of(CUTS))]


EXPORT_PRE_TOKENIZER = st.builds(Cut, by=st.sampled_from(list(CUTS)))
_NULLS = ("quantization_config", "rope_scaling", "architectures", "sliding_window", "quantization")


class Nothing(Recipe):
    """A setting that the config says is nothing."""

    key: Annotated[str, Field(pattern=one_of(_NULLS))]


EXPORT_NULLS = st.builds(Nothing, key=st.sampled_from(_NULLS))


class Typed(Learned):
    """The type in which most of a file is kept."""

    outtype: Annotated[str, Field(pattern="^(f32|f16|q8_0|q4_k_m)$")]


TYPED = st.builds(
    Typed, rows=ONE_ROW, model=MODELS, outtype=st.sampled_from(["f16", "q8_0", "f32"]), kind=st.just(DEFAULT_KIND)
)


class Constants(Recipe):
    """A model, how long a text it reads, and what its norms add."""

    model: ModelRecipe
    context: Annotated[int, Field(ge=64)]
    epsilon: Annotated[float, Field(gt=0, lt=1)]


EXPORT_CONSTANTS = st.builds(
    Constants,
    model=st.sampled_from([WIDE, TINY, ModelRecipe(heads=6, kv_heads=2, head_size=6)]),
    context=st.sampled_from([8192, 100]),
    epsilon=st.sampled_from([1e-6, 3e-4]),
)
