"""Writes the tiny model of a recipe to disk, with its tokenizer."""

from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.chat.catalog import CHATML
from finetune.files import write_json, write_text
from finetune_strategies.recipes import BOS, CONTROL_TOKENS, EOS, MERGES, PAD, ModelRecipe

_TOOLS = """\
{%- if tools or date_string is defined %}
    {{- '<|im_start|>system\\n' }}
    {%- if date_string is defined %}{{- 'Today: ' + date_string + '\\n' }}{%- endif %}
    {%- for tool in tools or [] %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('the system speaks first') }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- if message.content %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""In the style of Qwen 3's; with marks around what is said, which TRL asks for and others pass over."""


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
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=recipe.turned)
    control = [*CONTROL_TOKENS, *([BOS] if recipe.bos != "none" else [])]
    merges = [] if recipe.words == "bytes" else list(MERGES)
    known = [*CONTROL_TOKENS, *letters, *control[len(CONTROL_TOKENS) :], *map("".join, merges)]
    words = {word: number for number, word in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=recipe.words == "spaced")
    tokenizer.decoder = decoders.ByteLevel()
    sides = {"lstrip": recipe.takes == "left", "rstrip": recipe.takes == "right"}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False, **sides) for token in control])
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
    template = _TOOLS if recipe.template == "tools" else CHATML.jinja
    write_text(folder / "chat_template.jinja", first + template)
