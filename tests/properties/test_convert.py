"""Laws of what a GGUF file is to hold: settings, weights and tokenizers, before any of it is written."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from finetune.adapters.peft_files import WEIGHTS, read_settings
from finetune.errors import FineTuneError, ModelError
from finetune.export.corpus import nasty_texts
from finetune.export.families import FAMILIES, describe_model, interleave, to_gguf_layout
from finetune.export.outtypes import BLOCKS, OUTTYPES, Outtype, choose_storage
from finetune.export.pre_tokenizer import DIGITS, GPT2, NAMES, QWEN2, name_pre_tokenizer
from finetune.export.sources import AdapterWeights, Files, Merged
from finetune.export.vocabulary import CONTROL, SPACE, UNUSED, Special, describe_vocabulary, serving_template
from finetune_strategies.adapters import AdaptedModel, varied_models
from finetune_strategies.models import llama_configs
from finetune_strategies.profiles import examples
from finetune_strategies.scratch import empty_folder
from finetune_strategies.tokenizers import TokenizerKind, tokenizer_folder, tokenizer_kinds
from support.tiny_llamas import open_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
describe = partial(describe_model, tied=True, vocab_size=50)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_permutation_makes_neighbours_turn_as_halves_did(heads: int, pairs: int, seed: int) -> None:
    """For any number and width of heads: turned in neighbours after the permutation == turned in halves before it."""
    dice = np.random.default_rng(seed)
    rows = dice.standard_normal((heads * 2 * pairs, 3))
    angles = dice.standard_normal(pairs)

    def turn(head: Any, first: Any, second: Any) -> Any:
        turned = np.empty_like(head)
        turned[first] = head[first] * np.cos(angles)[:, None] - head[second] * np.sin(angles)[:, None]
        turned[second] = head[second] * np.cos(angles)[:, None] + head[first] * np.sin(angles)[:, None]
        return turned

    halves, neighbours = np.arange(pairs), 2 * np.arange(pairs)
    split = rows.reshape(heads, -1, 3)
    wanted = np.concatenate([turn(head, halves, halves + pairs) for head in split])
    told = [turn(head, neighbours, neighbours + 1) for head in interleave(rows, heads).reshape(heads, -1, 3)]
    assert np.allclose(np.concatenate(told), interleave(wanted, heads))


def test_weights_are_stored_as_each_family_has_them() -> None:
    """Keys are permuted by key heads in Llama and Mistral alone, biases too; Gemma's gains grow by one; GPT-2 turns."""
    keys, gains = np.arange(16.0 * 3).reshape(16, 3), np.arange(12.0)
    plain = ("qwen2", "qwen3", "phi3")
    for kind in ("llama", "mistral", *plain, "gemma"):
        narrow = {"head_dim": 2} if kind in ("qwen2", "phi3") else {}
        act = "gelu_pytorch_tanh" if kind == "gemma" else "silu"
        described = describe({**LLAMA, "model_type": kind, "hidden_act": act, **narrow})
        name = "model.layers.0.self_attn.k_proj"
        permuted = kind in ("llama", "mistral")
        for rows, leaf in ((keys, "weight"), (keys[:, 0], "bias")):
            assert np.array_equal(
                to_gguf_layout(described, f"{name}.{leaf}", rows), interleave(rows, 2) if permuted else rows
            )
        assert np.array_equal(to_gguf_layout(described, "model.norm.weight", gains), gains + (kind == "gemma"))
    gpt2 = {"model_type": "gpt2", "n_embd": 6, "n_head": 3, "n_layer": 1, "n_positions": 9}
    described = describe({**gpt2, "activation_function": "gelu_new"})
    assert np.array_equal(to_gguf_layout(described, "h.0.attn.c_attn.weight", keys), keys.T)
    assert np.array_equal(to_gguf_layout(described, "wpe.weight", keys), keys)
    assert len(FAMILIES) == 9


@given(st.sampled_from([50.0, 1e4, 5e5]), st.sampled_from([2.0, 8.0]), st.sampled_from([40, 64]))
def test_rope_says_the_same_in_old_words_and_new(theta: float, factor: float, original: int) -> None:
    """rope_theta with rope_scaling, as older files have it, and rope_parameters give the same; nothing is lost."""
    for kind in ("linear", "yarn", "llama3"):
        scaling = {"factor": factor, "original_max_position_embeddings": original}
        newer = {**LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}
        for key in ("type", "rope_type"):
            older = {**LLAMA, "rope_theta": theta, "rope_scaling": {key: kind, **scaling}}
            assert describe(older).metadata == describe(newer).metadata
        told = describe(newer)
        assert told.metadata["llama.rope.freq_base"] == theta
        if kind == "llama3":
            factors = told.extra["rope_freqs.weight"]
            assert (np.diff(factors) >= 0).all()
            assert (factors.min(), len(factors)) == (1.0, 4)
            assert factors.max() <= factor
        else:
            assert told.metadata["llama.rope.scaling.type"] == kind
            assert told.metadata["llama.rope.scaling.factor"] == factor


REFUSED: dict[str, dict[str, Any]] = {
    "model_type 'mamba'": {"model_type": "mamba"},
    "hidden_act is 'relu'": {"hidden_act": "relu"},
    "rope_type is 'dynamic'": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope_type is 'llama3'": {"model_type": "qwen3", "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
    "which llama.cpp computes otherwise": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 3.0}
    },
    "not as wide as the model": {"model_type": "qwen2"},
    "partial_rotary_factor is 0.5": {"partial_rotary_factor": 0.5},
    "does not say hidden_size": {"hidden_size": None},
    "num_attention_heads is 'six'": {"num_attention_heads": "six"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_model_that_llama_cpp_does_not_compute_is_refused(words: str) -> None:
    """Each of 9 settings that llama.cpp would compute otherwise, or that are no settings, is named."""
    assert len(REFUSED) == 9
    with pytest.raises(ModelError, match=words):
        describe({**LLAMA, **REFUSED[words]})


def test_context_ends_where_the_window_does() -> None:
    """A model with a sliding window is written with no more context than that, and it is told; an unused one is not."""
    cut = describe({**LLAMA, "model_type": "mistral", "sliding_window": 16})
    assert (cut.metadata["llama.context_length"], len(cut.notes)) == (16, 1)
    whole = describe({**LLAMA, "model_type": "qwen3", "sliding_window": 16, "use_sliding_window": False})
    assert (whole.metadata["qwen3.context_length"], whole.notes) == (64, ())


def test_windows_alternate_as_the_family_has_them() -> None:
    """Every second layer of Gemma 2 and every sixth of Gemma 3 sees all, in files that say so and in older ones."""
    for kind, every in (("gemma2", 2), ("gemma3_text", 6)):
        sizes = {
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 30.0,
        }
        caps = {"attn_logit_softcapping": 50.0} if kind == "gemma2" else {}
        older = {**LLAMA, **sizes, **caps, "model_type": kind, "hidden_act": "gelu_pytorch_tanh"}
        names = ["full_attention" if layer % every == 0 else "sliding_attention" for layer in range(1, 8)]
        for config in (older, {**older, "layer_types": names}):
            told = describe(config).metadata
            assert told[f"{FAMILIES[kind].arch}.attention.sliding_window_pattern"] == [
                name == "sliding_attention" for name in names
            ]
            assert told[f"{FAMILIES[kind].arch}.final_logit_softcapping"] == 30.0
        with pytest.raises(ModelError, match="query_pre_attn_scalar is 9"):
            describe({**older, "query_pre_attn_scalar": 9})


@examples(1 / 2)
@given(varied_models(llama_configs(), dropouts=(0.0,)))
def test_merged_weights_compute_what_the_adapter_does(model: AdaptedModel) -> None:
    """A base with any adapter merged in, read from its files one weight at a time, gives the adapter's logits."""
    with empty_folder() as folder:
        from finetune.backends import open_backend

        open_backend("reference").create(model.config, folder, 3)
        session = open_model(folder)
        try:
            session.attach(model.target, 0)
        except FineTuneError:  # tables that are tied are not trained whole
            return
        dice = np.random.default_rng(1)
        for tensor in session.adapter.tensors().values():
            tensor += dice.normal(0, 0.3, tensor.shape)
        saved = folder / "adapter"
        saved.mkdir()
        session.save_adapter(saved)
        adapter = AdapterWeights(saved / WEIGHTS, read_settings(saved, transposed=False))
        merged = Merged(Files([folder / "model.safetensors"]), adapter, ())
        save_file({name: merged.read(name) for name in merged.names()}, folder / "model.safetensors")
        ids = (1, 5, 2, 7)
        again = open_model(folder)
        assert np.allclose(again.logits(ids), session.logits(ids), rtol=1e-3, atol=1e-3)


def test_files_are_read_in_every_float(tmp_path: Path) -> None:
    """A bfloat16 is the upper half of a float32, and every file counts; NaN, cuts and integers are refused by name."""
    weights = np.array([[1.0, -2.5], [3.25, 1e30]], np.float32)
    raw = (weights.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "bf16.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw)
    expected = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
    assert np.array_equal(Files([path]).read("w").ravel(), expected.view(np.float32))
    assert np.array_equal(Files([path]).read("w")[0], weights[0])
    save_file({"v": weights}, tmp_path / "second.safetensors")
    assert list(Files([path, tmp_path / "second.safetensors"]).names()) == ["w", "v"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelError, match="w cannot be read"):
        Files([path]).read("w")
    save_file({"w": np.array([1.0, np.nan], np.float32), "n": np.array([1])}, path)
    for name, words in (("w", "NaN"), ("n", "I64")):
        with pytest.raises(ModelError, match=words):
            Files([path]).read(name)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match="cut off"):
        Files([path])


@given(tokenizer_kinds(), st.integers(0, 70))
def test_vocabulary_holds_every_token_in_its_place(kind: TokenizerKind, spare: int) -> None:
    """Each id has its text, control tokens are control tokens, and rows without a token are unused; each text once."""
    folder = tokenizer_folder(kind)
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = said["model"]["vocab"]
    rows = len(vocab) + spare
    bos = kind.control_tokens.index(kind.bos_token) if kind.bos != "none" else None
    special = Special(bos, 0, 0, (0,), kind.adds_bos)
    told = describe_vocabulary(said, special, rows)
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in told.metadata.items()}
    texts, types = keys["tokens"], keys["token_type"]
    assert len(texts) == len(set(texts)) == len(types) == rows
    assert all(texts[number] == text for text, number in vocab.items())
    assert {texts[place] for place, found in enumerate(types) if found == CONTROL} == set(kind.control_tokens)
    assert types.count(UNUSED) == spare
    assert keys["merges"] == [" ".join(pair) for pair in said["model"]["merges"]]
    assert (keys["model"], keys["pre"], keys["add_bos_token"]) == ("gpt2", "gpt-2", kind.adds_bos)
    assert keys["bos_token_id"] == (0 if bos is None else bos)
    assert told.notes == ()
    with pytest.raises(ModelError, match="resize the table"):
        describe_vocabulary(said, special, len(vocab) - 1)
    template = "{{ bos_token }}x"
    assert serving_template(template, special).endswith(template)
    assert (serving_template(template, special) == template) is (bos is not None)


def test_stops_beyond_what_a_file_holds_are_told() -> None:
    """Two tokens beside the end of text end an answer; those that llama.cpp knows by name give way to others."""
    said = json.loads((tokenizer_folder(TokenizerKind("none", "own")) / "tokenizer.json").read_text(encoding="utf-8"))
    ids = said["model"]["vocab"]
    nameless = [ids[text] for text in ("<|im_start|>", "<|start_header_id|>", "<|end_header_id|>")]
    describe = partial(describe_vocabulary, said)
    told = describe(Special(None, 0, 0, (0, ids["<|eot_id|>"], nameless[0]), adds_bos=False), 500)
    assert told.metadata["tokenizer.ggml.eot_token_id"] == nameless[0]
    assert told.metadata["tokenizer.ggml.eom_token_id"] == ids["<|eot_id|>"]
    assert told.notes == ()
    told = describe(Special(None, 0, 0, (ids["<|im_end|>"], *nameless), adds_bos=False), 500)
    assert [told.metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("eot", "eom")] == nameless[:2]
    assert len(told.notes) == 1
    assert "'<|end_header_id|>'" in told.notes[0]


def _steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}


BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@given(st.sampled_from(sorted(NAMES)))
def test_pre_tokenizer_is_read_from_its_patterns(key: tuple[tuple[str, ...], bool]) -> None:
    """Each list of patterns is found by what it says alone; one letter more or less of a pattern is another."""
    patterns, whole_words = key
    steps = [{"type": "Digits", "individual_digits": True} if one == DIGITS else _split(one) for one in patterns]
    assert name_pre_tokenizer(_steps(*steps, BYTES), whole_words=whole_words) == NAMES[key]
    if GPT2 in patterns:
        own = [step for step in steps if step.get("pattern") != {"Regex": GPT2}]
        told = _steps(*own, BYTES | {"use_regex": True})
        assert name_pre_tokenizer(told, whole_words=whole_words) == NAMES[key]
    for changed in (patterns[-1][:-1], f"{patterns[-1]}+"):
        with pytest.raises(ModelError, match=r"no pre-tokenizer of llama\.cpp"):
            name_pre_tokenizer(_steps(*steps[:-1], _split(changed), BYTES), whole_words=whole_words)


ODD_CUTS: tuple[Any, ...] = (
    None,
    {"type": "Whitespace"},
    BYTES,
    BYTES | {"use_regex": True, "add_prefix_space": True},
    _split(QWEN2),
    _steps(_split(QWEN2, invert=True), BYTES),
    _steps(_split(QWEN2, behavior="Removed"), BYTES),
    _steps({"type": "Digits", "individual_digits": False}, BYTES),
    _steps(_split(QWEN2) | {"pattern": {"String": " "}}, BYTES),
)


@pytest.mark.parametrize("cuts", ODD_CUTS, ids=str)
def test_pre_tokenizer_that_llama_cpp_has_not_is_refused(cuts: Any) -> None:
    """Each of 9 ways to cut text that llama.cpp has not is refused, and never taken for another."""
    assert len(ODD_CUTS) == 9
    with pytest.raises(ModelError, match=r"llama\.cpp"):
        name_pre_tokenizer(cuts, whole_words=False)


def _pieces(merges: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    """A tokenizer of pieces: bytes, some letters, and what these merges make."""
    texts = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"abc", *map("".join, merges)]
    model = {"type": "BPE", "byte_fallback": True, "vocab": {text: n for n, text in enumerate(dict.fromkeys(texts))}}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    said = {"model": {**model, "merges": merges}, "normalizer": space, "added_tokens": []}
    return {**said, **changes}


@given(st.permutations(["ab", "bc", "abc", f"{SPACE}a", f"{SPACE}ab"]))
@example(["abc", "ab", "bc", f"{SPACE}a", f"{SPACE}ab"])
def test_pieces_are_scored_in_the_order_of_their_merges(made: list[str]) -> None:
    """A piece that is merged earlier has the higher score, and a merge that is not listed refuses the tokenizer."""
    known = {*made, *"abc", SPACE}
    cuts = [(text[:at], text[at:]) for text in made for at in range(1, len(text))]
    merges = [pair for pair in cuts if set(pair) <= known]
    told = describe_vocabulary(_pieces(merges), Special(0, 1, 1, (1,), adds_bos=True), 300)
    scores = dict(zip(told.metadata["tokenizer.ggml.tokens"], told.metadata["tokenizer.ggml.scores"], strict=True))
    assert [scores[text] for text in made] == sorted((scores[text] for text in made), reverse=True)
    assert told.metadata["tokenizer.ggml.add_space_prefix"] is False
    with pytest.raises(ModelError, match="leave apart"):
        describe_vocabulary(_pieces([pair for pair in merges if pair != ("ab", "c")]), Special(0, 1, 1, (), True), 300)


METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
ODD_PIECES: dict[str, dict[str, Any]] = {
    "space is put in front of the first word only": {
        "normalizer": None,
        "pre_tokenizer": METASPACE | {"prepend_scheme": "first"},
    },
    "normalizer": {"normalizer": {"type": "NFKC"}},
    "two ids have the text 'a'": {"added_tokens": [{"id": 290, "content": "a"}]},
    "swallows space": {"added_tokens": [{"id": 290, "content": "<x>", "lstrip": True}]},
    "WordPiece": {"model": {"type": "WordPiece"}},
    "dropout": {"model": {"type": "BPE", "dropout": 0.1}},
    "<0x07>": {"model": {"type": "BPE", "byte_fallback": True, "vocab": {f"<0x{n:02X}>": n for n in range(7)}}},
}


@pytest.mark.parametrize("words", ODD_PIECES)
def test_tokenizer_that_llama_cpp_has_not_is_refused(words: str) -> None:
    """Each of 7 tokenizers that llama.cpp cannot be is refused, by what it has that llama.cpp has not."""
    assert len(ODD_PIECES) == 7
    with pytest.raises(ModelError, match=words):
        describe_vocabulary(_pieces([], **ODD_PIECES[words]), Special(0, 1, 1, (1,), adds_bos=True), 300)


def test_nasty_texts_are_many_and_always_the_same() -> None:
    """At least 200 texts, no two alike, the same each time, with each added token in plain text and overlaps of two."""
    texts = nasty_texts(["<|a|>", "|>|b|"])
    assert texts == nasty_texts(["<|a|>", "|>|b|"])
    assert len(texts) == len(set(texts)) >= 200
    assert {"a<|a|>b", "<|a|>|b|"} <= set(texts)
    assert all(text.isascii() for text in nasty_texts([], "ASCII"))
    assert "cafe\u0301" not in "".join(nasty_texts([], "NFC"))


def test_outtype_gives_more_bits_to_half_of_the_layers() -> None:
    """q4_k_m and q5_k_m keep half of 32 layers' values and down projections in q6_k, as llama.cpp's README has it."""
    for outtype, mostly in (("q4_k_m", "q4_k"), ("q5_k_m", "q5_k")):
        for part in ("attn_v", "ffn_down"):
            kept = [_storage(f"blk.{layer}.{part}.weight", (256, 512), outtype) for layer in range(32)]
            assert (kept.count("q6_k"), kept.count(mostly)) == (16, 16)
            assert kept[:4] == kept[-4:] == ["q6_k"] * 4
        assert _storage("blk.0.attn_q.weight", (256, 512), outtype) == mostly
        assert _storage("output.weight", (640, 256), outtype, is_head=True) == "q6_k"
    assert _storage("blk.5.attn_qkv.weight", (768, 256), "q4_k_m") == "q5_k"
    assert _storage("blk.5.attn_qkv.weight", (768, 256), "q5_k_m") == "q6_k"


@given(st.sampled_from(OUTTYPES), st.integers(1, 600), st.integers(0, 31), st.sampled_from(["attn_v", "attn_k"]))
def test_outtype_never_cuts_a_block(outtype: Outtype, width: int, layer: int, part: str) -> None:
    """Every row is a whole number of blocks; norms, biases and positions stay in full."""
    for is_head in (False, True):
        storage = _storage(f"blk.{layer}.{part}.weight", (3, width), outtype, is_head=is_head)
        assert width % BLOCKS[storage].weights == 0
        assert storage != "f32" or outtype == "f32"
    for place, shape in (("blk.0.attn_norm.weight", (width,)), ("position_embd.weight", (3, width))):
        assert _storage(place, shape, outtype) == "f32"
    smaller = {"q4_k_m": "q5_0", "q5_k_m": "q5_1", "q6_k": "q8_0"}
    assert outtype not in smaller or _storage("blk.0.attn_k.weight", (3, 96), outtype) == smaller[outtype]


def _storage(place: str, shape: tuple[int, ...], outtype: Any, *, is_head: bool = False) -> Any:
    return choose_storage(place, shape, outtype, 32, is_head=is_head)
