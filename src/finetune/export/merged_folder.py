"""Writes a run's result as a Hugging Face model folder: weights, settings, tokenizer, template, model card."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.export.model_files import KINDS, Dtype, ModelFiles
from finetune.export.result import Result
from finetune.export.sources import Files
from finetune.models.shape import read_config, refuse_leading_out, weight_files
from finetune.models.travel import without_places
from finetune.report.card import CARD, licence_in, model_card

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def plan_weights(result: Result, dtype: Dtype | None) -> ModelFiles:
    """The weights of a run's result before they are written; `dtype` None keeps each as the base has it.

    Raises:
        ModelError: as `Result.weights`.
    """
    files, source = result.weights()
    return ModelFiles(files, source, dtype)


def write_merged(result: Result, weights: ModelFiles, folder: Path) -> None:
    """Write everything into an existing folder.

    Raises:
        ModelError: a file cannot be used.
        OSError: the disk does not take it.
    """
    weights.write(folder)
    for name, content in side_files(result, weights.dtype).items():
        (folder / name).write_bytes(content)


def side_files(result: Result, dtype: Dtype | None) -> dict[str, bytes]:
    """The content of each file beside the weights, by its name.

    Raises:
        ModelError: one of the base's is broken, or is a link that leads out of its folder.
    """
    config = read_config(result.folder)
    if dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    files = {"config.json": without_places((json.dumps(config | older_names(config), indent=2) + "\n").encode())}
    for name in TOKENIZER_FILES:
        # What was trained with travels with it; the rest of a tokenizer's files lies by the base.
        place = next(
            (folder / name for folder in (result.saved, result.location.folder) if (folder / name).exists()), None
        )
        if place is not None:
            refuse_leading_out(place)
            files[name] = without_places(place.read_bytes())
    for name in ("chat_template.jinja", "generation_config.json"):
        files[name] = (result.saved / name).read_bytes()
    return {**files, CARD: _card(result, dtype).encode()}


def older_names(config: Mapping[str, object]) -> dict[str, Any]:
    """Settings under their older names, the only ones that mlx-lm and llama.cpp's converter read.

    transformers 5 writes only the newer ones, and mlx-lm then silently rotates by its default base.
    """
    older: dict[str, Any] = {}
    if config.get("model_type") == "gpt2" and "n_positions" in config:
        older["n_ctx"] = config["n_positions"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = rope
    return older


def written_weights(result: Result, folder: Path) -> ModelFiles:
    """The weights that a merged model which was written before is to hold, in the types that it has them in.

    Raises:
        ModelError: its files cannot be read.
    """
    found, base = Files(weight_files(folder)), Files(weight_files(result.folder))
    if all(found.kind(name) == base.kind(name) for name in set(found.names()) & set(base.names())):
        return plan_weights(result, None)
    kinds = {found.kind(name) for name in found.names()}
    return plan_weights(result, next((dtype for dtype, kind in KINDS.items() if kind in kinds), None))


def merged_problems(result: Result, weights: ModelFiles, folder: Path) -> Iterator[str]:
    """What is wrong with a merged model that was written before, file by file and weight by weight."""
    for name, content in side_files(result, weights.dtype).items():
        path = folder / name
        # The model card is for people, who may well add to it.
        if name != CARD and not path.is_file():
            yield f"{name} is missing"
        elif name != CARD and path.read_bytes() != content:
            yield f"{name} has changed"
    yield from weights.differences(Files(weight_files(folder)))


def _card(result: Result, dtype: Dtype | None) -> str:
    """The model card: the run's own, with how the weights are kept."""
    more = [
        f"Weights: {'each in the type that the base has it in' if dtype is None else dtype}.",
        "Loaded by plain transformers in a fresh process, it was held to what the trainer computes before it came to "
        "its place.",
        f"Run: `{result.manifest['id']}`.",
        *(f"Note: {note}." for note in result.quantized_notes),
    ]
    return model_card(result.manifest, licence_in(result.location.folder), "merged", more)
