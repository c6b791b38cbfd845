"""Laws of GGUF: keys and weights are what the model's own files say, in the order in which llama.cpp reads them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient, Tensors
from finetune.verify.laws.helpers import accepted, adapter_of, altered, refused, train, weights_of
from finetune.verify.subjects.answers import ExportDescription, Folder, Planned
from finetune_strategies.cases import export as cases
from finetune_strategies.cases.learned import Learned
from finetune_strategies.cases.rows import PLAIN, TINY
from finetune_strategies.recipes import FEWEST_WORDS, ModelRecipe

_WEIGHTS = "model.safetensors"


def _model(trainer: SubjectClient, recipe: ModelRecipe) -> Path:
    return altered(trainer, trainer.model(recipe), {"hidden_act": "silu"})


def _described(trainer: SubjectClient, model: Path, **more: object) -> tuple[Mapping[str, Any], Tensors]:
    found = trainer.ask("describe_export", ExportDescription, model=model, settings=PLAIN, **more)
    return found.metadata, trainer.tensors(found.file)


def _neighbours(rows: Any, heads: int) -> Any:
    """The rows of each head in the order 0, half, 1, half + 1, ...: row by row, as llama.cpp turns them."""
    size = len(rows) // heads
    order = [
        head * size + half * (size // 2) + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return rows[order]


@law("export.weights", ["describe_export"], cases.WRITTEN, examples=4)
@oracle("the rows of each head written down one by one, as llama.cpp turns neighbours")
def weights_are_the_models(trainer: SubjectClient, case: cases.Written) -> None:
    """A GGUF file holds every weight with its own shape; of queries and keys alone the rows are in another order."""
    model = _model(trainer, case.model)
    _, found = _described(trainer, model)
    for name, weight in load_file(model / _WEIGHTS).items():
        heads = {"q_proj": case.model.heads, "k_proj": case.model.kv_heads}.get(name.split(".")[-2], 0)
        wanted = _neighbours(weight, heads) if heads else weight
        there: Any = found.get(name)
        check(
            there is not None and there.shape == wanted.shape,
            expected=f"{name} {wanted.shape}",
            got=None if there is None else there.shape,
        )
        check(np.array_equal(there, wanted), expected=f"{name}: {wanted.ravel()[:3]}", got=there)


@law("export.adapted", ["describe_export", "train", "adapter_weights"], cases.EXPORT_ADAPTED, examples=2, cost=3)
@oracle("W + s B A in float64")
def adapter_is_in_the_export(trainer: SubjectClient, case: Learned) -> None:
    """A GGUF file of a run holds its base's weights with the adapter in them."""
    model = _model(trainer, case.model)
    adapter = adapter_of(train(trainer, model, case.settings, case.values))
    weights, parts = weights_of(trainer, model, adapter)
    (_, plain), (_, found) = _described(trainer, model), _described(trainer, model, adapter=adapter)
    for name in [name for name in parts if ".lora_A." in name]:
        stem = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        path = f"{stem}.weight"
        check(
            not np.allclose(found[path], plain[path], atol=1e-6), expected=f"{path} with the adapter", got="the base's"
        )
        if not stem.endswith(("q_proj", "k_proj")):
            grown = plain[path] + weights.scale * (parts[name.replace("lora_A", "lora_B")] @ parts[name])
            off = float(np.abs(found[path] - grown).max())
            check(off <= 1e-4, expected=f"{path} as base and adapter", got=f"off by {off:.3g}")


@law("export.rope", ["describe_export"], cases.EXPORT_ROPE, examples=10)
@oracle("the config itself; of Llama 3's scaling, that the shortest wave stays and the longest is divided")
def rotation_is_the_configs(trainer: SubjectClient, case: cases.Turned) -> None:
    """How positions turn queries and keys is written as the config says it, in its older words and its newer ones."""
    scaling: dict[str, Any] = {"rope_type": case.kind, "factor": case.factor}
    if case.kind in ("yarn", "llama3"):
        scaling |= {"original_max_position_embeddings": 64}
    if case.kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if case.kind == "default":
        scaling = {"rope_type": "default"}
    said: dict[str, Any] = {"rope_parameters": {**scaling, "rope_theta": case.theta}}
    if case.older:
        said = {"rope_scaling": scaling if case.kind != "default" else {}, "rope_theta": case.theta}
    model = altered(trainer, _model(trainer, ModelRecipe(head_size=16)), said)
    keys, found = _described(trainer, model)
    check(keys.get("llama.rope.freq_base") == case.theta, expected=case.theta, got=keys.get("llama.rope.freq_base"))
    written = {name: keys.get(f"llama.rope.scaling.{name}") for name in ("type", "factor")}
    wanted = {"type": case.kind, "factor": case.factor} if case.kind in ("linear", "yarn") else dict.fromkeys(written)
    check(written == wanted, expected=wanted, got=written)
    if case.kind == "yarn":
        original = keys.get("llama.rope.scaling.original_context_length")
        check(original == 64, expected="an original context of 64", got=original)
    factors = found.get("rope_freqs.weight")
    if case.kind == "llama3":
        ends = None if factors is None else (float(factors[0]), float(factors[-1]))
        last = 2 * math.pi * case.theta ** (14 / 16)
        assert last > 64, "the longest wave is longer than the original context"
        check(ends == (1.0, case.factor), expected=(1.0, case.factor), got=ends)
    else:
        check(factors is None, expected="no factors of frequencies", got=factors)


def _names(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Give it tokens that are not flagged as control tokens; returns llama.cpp's type of those that are none to it."""
    # No merge makes it, so that no text has it.
    tokenizer["model"]["vocab"]["<EOT>"] = FEWEST_WORDS
    for place, text in enumerate(("<|fim_prefix|>", "<think>"), start=FEWEST_WORDS + 1):
        added = {**tokenizer["added_tokens"][0], "id": place, "content": text, "special": False}
        tokenizer["added_tokens"].append(added)
    return {"<think>": 4}


@law("export.vocabulary", ["describe_export"], cases.EXPORT_VOCABULARY, examples=6)
@oracle("tokenizer.json itself")
def vocabulary_is_the_tokenizers(trainer: SubjectClient, case: cases.Words) -> None:
    """Every row of the embedding has its token in the file, with its text; what the model lacks is not made up."""
    model = altered(trainer, _model(trainer, ModelRecipe(vocabulary=FEWEST_WORDS + case.spare)), {})
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    for number in range(case.excess):
        added = {**tokenizer["added_tokens"][0], "id": FEWEST_WORDS + number, "content": f"<|more{number}|>"}
        tokenizer["added_tokens"].append(added)
    plain = _names(tokenizer) if case.named else {}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    described = refused(lambda: _described(trainer, model))
    if case.excess:
        check(described is None, expected="more tokens than rows are refused", got="an answer")
        return
    check(described is not None, expected="an answer", got="a refusal")
    assert described is not None
    keys = described[0]
    texts: Any = keys.get("tokenizer.ggml.tokens") or []
    check(len(texts) == FEWEST_WORDS + case.spare, expected=f"{FEWEST_WORDS + case.spare} tokens", got=len(texts))
    odd = [number for number, word in words.items() if texts[number] != word]
    check(
        not odd and len(set(texts)) == len(texts), expected="each token's own text", got=[texts[each] for each in odd]
    )
    types: Any = keys.get("tokenizer.ggml.token_type") or []
    for token in tokenizer["added_tokens"]:
        wanted_type = plain.get(token["content"], 3)
        check(types[token["id"]] == wanted_type, expected=(token["content"], wanted_type), got=types[token["id"]])
    check("<EOT>" not in texts, expected="no word bears a name that llama.cpp takes for a control token", got="<EOT>")
    control = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    wanted = {"eos": control["</s>"], "padding": control["<|pad|>"], "bos": control["</s>"]}
    written = {name: keys.get(f"tokenizer.ggml.{name}_token_id") for name in wanted}
    check(written == wanted, expected=wanted, got=written)
    adds = keys.get("tokenizer.ggml.add_bos_token")
    check(adds is False, expected="no begin-of-text token is put in front of text", got=adds)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    found = keys.get("tokenizer.chat_template")
    check(str(found).endswith(template), expected="the model's chat template", got=found)


@law("export.pre_tokenizer", ["describe_export"], cases.EXPORT_PRE_TOKENIZER, examples=6)
@oracle("the patterns behind llama.cpp's names, as its llama-vocab.cpp has them")
def pre_tokenizer_is_read(trainer: SubjectClient, case: cases.Cut) -> None:
    """The pre-tokenizer that is named cuts text as the model's own does; one that llama.cpp lacks is refused."""
    model = altered(trainer, _model(trainer, TINY), {})
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    cuts, name = cases.CUTS[case.by]
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "pre_tokenizer": cuts}), encoding="utf-8")
    found = refused(lambda: _described(trainer, model))
    written = "" if found is None else found[0].get("tokenizer.ggml.pre")
    check(written == name, expected=name or "a refusal", got=written or "a refusal")


@law("export.constants", ["describe_export"], cases.EXPORT_CONSTANTS, examples=4)
@oracle("config.json itself")
def constants_arrive(trainer: SubjectClient, case: cases.Constants) -> None:
    """Every number by which a model's config says what it is arrives in its file."""
    said = {"max_position_embeddings": case.context, "rms_norm_eps": case.epsilon}
    model = altered(trainer, _model(trainer, case.model), said)
    keys, _ = _described(trainer, model)
    wanted = {
        "context_length": case.context,
        "attention.layer_norm_rms_epsilon": case.epsilon,
        "block_count": case.model.layers,
        "embedding_length": case.model.hidden,
        "feed_forward_length": case.model.intermediate,
        "attention.head_count": case.model.heads,
        "attention.head_count_kv": case.model.kv_heads,
        "rope.dimension_count": case.model.head_size,
    }
    found = {key: keys.get(f"llama.{key}") for key in wanted}
    check(found == wanted, expected=wanted, got=found)


@law("export.shards", ["describe_export"], cases.WRITTEN, examples=2)
@oracle("the same weights in one file")
def shards_are_one_model(trainer: SubjectClient, case: cases.Written) -> None:
    """A model in several files is the model in one."""
    whole = _model(trainer, case.model)
    model = altered(trainer, whole, {})
    tensors = load_file(model / _WEIGHTS)
    (model / _WEIGHTS).unlink()
    places: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, model / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (_, found), (_, wanted) = _described(trainer, model), _described(trainer, whole)
    check(found.keys() == wanted.keys(), expected=sorted(wanted), got=sorted(found))
    odd = [name for name in wanted if not np.array_equal(found[name], wanted[name])]
    check(not odd, expected="the weights of both files", got=odd)


@law("export.packed", ["describe_export"], cases.WRITTEN, examples=2)
@oracle("a model whose numbers are packed in whole words, with scales and biases beside them")
def packed_weights_are_refused(trainer: SubjectClient, case: cases.Written) -> None:
    """Weights that are packed are not taken for plain numbers."""
    model = altered(trainer, _model(trainer, case.model), {"quantization": {"group_size": 32, "bits": 4}})
    tensors = load_file(model / _WEIGHTS)
    path = "model.layers.0.mlp.gate_proj"
    rows = len(tensors[f"{path}.weight"])
    tensors[f"{path}.weight"] = np.ones((rows, 4), np.uint32)
    tensors |= {f"{path}.{part}": np.ones((rows, 1), np.float32) for part in ("scales", "biases")}
    save_file(tensors, model / _WEIGHTS, metadata={"format": "pt"})
    found = refused(lambda: _described(trainer, model))
    check(found is None, expected="a refusal", got="an answer with packed numbers as weights")


@law("export.nulls", ["describe_export"], cases.EXPORT_NULLS, examples=5)
@oracle("the same config without it")
def null_is_not_said(trainer: SubjectClient, case: cases.Nothing) -> None:
    """A setting that is null in a model's config is one that it does not say."""
    model = _model(trainer, TINY)
    (found, _), (wanted, _) = _described(trainer, altered(trainer, model, {case.key: None})), _described(trainer, model)
    odd = {key: found.get(key) for key in wanted if key != "general.name" and found.get(key) != wanted[key]}
    check(not odd, expected={key: wanted[key] for key in odd}, got=odd)


@law("export.types", ["plan_export"], cases.TYPED, examples=4, tier=2)
@oracle("the file of 32 bits a weight")
def types_change_no_words(trainer: SubjectClient, case: cases.Typed) -> None:
    """Whatever type a file keeps its weights in, it says the same of the model and holds every weight."""
    model = _model(trainer, case.model)
    found, wanted = (
        trainer.ask("plan_export", Planned, model=model, settings=PLAIN, outtype=each) for each in (case.outtype, "f32")
    )
    own = ("general.file_type",)
    odd = {key for key in wanted.metadata if key not in own and found.metadata.get(key) != wanted.metadata[key]}
    check(not odd, expected={key: wanted.metadata[key] for key in odd}, got=[found.metadata.get(key) for key in odd])
    check(found.tensors == wanted.tensors, expected=wanted.tensors, got=found.tensors)
    count = len(load_file(model / _WEIGHTS))
    check(len(found.tensors) == count, expected=f"{count} tensors", got=len(found.tensors))


@law("export.back", ["import_back"], cases.TYPED, examples=4, tier=2)
@oracle("the model's own weights, each within half a step of the file's type; its tokenizer.json and template")
def file_gives_the_model_back(trainer: SubjectClient, case: cases.Typed) -> None:
    """A model folder that is made of a GGUF file has the weights, the words and the template that went into it."""
    recipe = case.model.model_copy(update={"vocabulary": FEWEST_WORDS + 1})
    model = _with_a_merge(_model(trainer, recipe))
    given = {"model": model, "settings": PLAIN, "outtype": case.outtype}
    back = Path(accepted(lambda: trainer.ask("import_back", Folder, **given), "a file that was just written").folder)
    wanted, found = load_file(model / _WEIGHTS), load_file(back / _WEIGHTS)
    check(found.keys() == wanted.keys(), expected=sorted(wanted), got=sorted(found))
    for name, weight in wanted.items():
        step = _half_steps(weight, case.outtype) if weight.ndim > 1 else np.zeros_like(weight)
        off = np.abs(found[name].astype(np.float64) - weight)
        check(bool((off <= step).all()), expected=f"{name} as {case.outtype} holds it", got=f"off by {off.max():.3g}")
    words = [json.loads((each / "tokenizer.json").read_text(encoding="utf-8")) for each in (model, back)]
    before, after = (
        {**each["model"]["vocab"], **{token["content"]: token["id"] for token in each["added_tokens"]}}
        for each in words
    )
    odd = {word: after.get(word) for word, number in before.items() if after.get(word) != number}
    check(not odd, expected="each word's own id", got=odd)
    wanted_template, path = (model / "chat_template.jinja").read_text(encoding="utf-8"), back / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else ""
    check(template.endswith(wanted_template), expected=wanted_template, got=template or "no template")


def _with_a_merge(model: Path) -> Path:
    """The model, whose tokenizer makes one word of two: llama.cpp reads none without merges."""
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    one, other = sorted(word for word in tokenizer["model"]["vocab"] if word.isalpha() and len(word) == 1)[:2]
    tokenizer["model"]["vocab"][one + other] = FEWEST_WORDS
    tokenizer["model"]["merges"] = [[one, other]]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return model


def _half_steps(weight: Any, outtype: str) -> Any:
    """By how much a number may be off that is rounded once to the type."""
    size = np.abs(weight.astype(np.float64))
    if outtype == "f32":
        return np.zeros_like(size)
    if outtype == "f16" or size.shape[-1] % 32:
        return np.maximum(size * 2**-11, 2**-25)
    # Of 32 numbers the largest is 127 steps; the step itself is kept in float16.
    largest = size.reshape(*size.shape[:-1], -1, 32).max(axis=-1)
    return np.repeat(largest * (0.5 / 127 + 2**-10), 32, axis=-1)


@law("export.alone", ["plan_export", "train", "adapter_weights"], cases.TYPED, examples=3, tier=2, cost=3)
@oracle("the adapter's own tensors")
def adapter_alone_holds_itself(trainer: SubjectClient, case: cases.Typed) -> None:
    """A file of an adapter alone holds A and B of its layers, and nothing of the base."""
    model = _model(trainer, case.model)
    adapter = adapter_of(train(trainer, model, case.settings, case.values))
    _, parts = weights_of(trainer, model, adapter)
    given = {"model": model, "settings": case.settings, "outtype": case.outtype, "adapter": adapter, "alone": True}
    found = trainer.ask("plan_export", Planned, **given)
    odd = [name for name in found.tensors if not name.endswith((".lora_a", ".lora_b"))]
    check(not odd, expected="A and B alone", got=odd)
    shapes = sorted(map(list, found.tensors.values()))
    wanted = sorted(list(tensor.shape) for tensor in parts.values())
    check(shapes == wanted, expected=wanted, got=shapes)
