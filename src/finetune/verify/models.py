"""Writes the tiny model of a recipe to disk, with its tokenizer."""

from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.chat.catalog import CHATML
from finetune.files import write_json, write_text
from finetune_strategies.recipes import BOS, CONTROL_TOKENS, EOS, PAD, ModelRecipe


def build_model(recipe: ModelRecipe, folder: Path) -> None:
    """Write a model's files into a new folder."""
    folder.mkdir(parents=True)
    _write_tokenizer(folder, recipe)
    config = {
        "model_type": "llama",
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_size,
        "vocab_size": recipe.vocabulary,
        "max_position_embeddings": 1_024,
        "initializer_range": 0.3,
        # Defaults, but not everybody's: what a trainer has to guess says nothing about how it trains.
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "pad_token_id": CONTROL_TOKENS.index(PAD),
        "eos_token_id": CONTROL_TOKENS.index(EOS),
    }
    open_backend("reference").create(config, folder, seed=recipe.seed)


def _write_tokenizer(folder: Path, recipe: ModelRecipe) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=recipe.turned)
    control = [*CONTROL_TOKENS, *([BOS] if recipe.bos != "none" else [])]
    words = {word: number for number, word in enumerate([*CONTROL_TOKENS, *letters, *control[len(CONTROL_TOKENS) :]])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    if recipe.bos in ("added", "written"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words[BOS])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": EOS, "pad_token": PAD}
    if recipe.bos != "none":
        settings["bos_token"] = BOS
    if recipe.bos in ("known", "configured"):
        settings["add_bos_token"] = recipe.bos == "configured"
    write_json(folder / "tokenizer_config.json", settings)
    first = "{{- bos_token -}}\n" if recipe.bos == "written" else ""
    write_text(folder / "chat_template.jinja", first + CHATML.jinja)
