"""Finished runs in seconds: tiny random models of several families, trained a little with adapters of every kind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config import load_config
from finetune.train import fine_tune
from support.gguf_models import gpt2_like, make_model
from support.workplace import QUICK, make_data, without_reload_check

TARGETS = ["q_proj", "k_proj", "down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"adapter.target_modules": TARGETS, "adapter.alpha": 7.0}),
    "rank-stabilized, by patterns": (
        "llama with biases, Llama 3's rope",
        {
            "adapter.target_modules": TARGETS,
            "adapter.alpha": 3.0,
            "adapter.scaling": "rank_stabilized",
            "adapter.rank_pattern": {"k_proj": 5},
            "adapter.alpha_pattern": {"layers.1.mlp.down_proj": 9.0},
        },
    ),
    "dora": ("qwen2", {"adapter.target_modules": ["q_proj", "o_proj"], "adapter.alpha": 5.0, "adapter.kind": "dora"}),
    "modules to save": (
        "llama",
        {
            "adapter.target_modules": ["k_proj"],
            "adapter.alpha": 5.0,
            "adapter.modules_to_save": ["lm_head", "model.norm"],
        },
    ),
    "tied head": ("qwen3", {"adapter.target_modules": ["v_proj", "up_proj"], "adapter.alpha": 5.0}),
    "rank-stabilized": (
        "llama",
        {
            "adapter.target_modules": TARGETS,
            "adapter.alpha": 3.0,
            "adapter.scaling": "rank_stabilized",
            "adapter.rank_pattern": {"k_proj": 5},
        },
    ),
    "dora on llama": ("llama", {"adapter.target_modules": ["q_proj"], "adapter.alpha": 5.0, "adapter.kind": "dora"}),
    "gpt2": ("gpt2", {"adapter.target_modules": ["c_attn", "c_proj"], "adapter.alpha": 7.0}),
    "gpt2, dora": (
        "gpt2",
        {"adapter.target_modules": ["c_attn", "c_fc"], "adapter.alpha": 7.0, "adapter.kind": "dora"},
    ),
    "whole model": ("llama", {"adapter.kind": "full"}),
}
"""The model and what differs from a plain run; together all kinds of weights that training can change."""


def tiny_model(folder: Path, family: str) -> Path:
    """A tiny random model whose tokenizer llama.cpp knows."""
    make_model(family, folder)
    gpt2_like(folder)
    return folder


def tiny_run(
    place: Path, kind: str, backend: str = "torch", changes: Mapping[str, Any] | None = None, *, step: int = 4
) -> Path:
    """A finished run of this kind in `place`, beside its model and its data, whose questions grow by so many words."""
    family, chosen = KINDS[kind]
    model = place / "model"
    if not model.exists():
        tiny_model(model, family)
    data = make_data(place / "rows.jsonl", 9, step=step)
    config = place / "config.json"
    config.write_text(json.dumps(as_file({**chosen, **(changes or {})}, model, data, backend)), encoding="utf-8")
    with without_reload_check():
        fine_tune(load_config(config, environ={}, overrides={}, profile=None), output=place / "run")
    return place / "run"


def as_file(chosen: dict[str, Any], model: Path, data: Path, backend: str) -> dict[str, Any]:
    """A configuration as its file has it."""
    plain = {
        key: value for key, value in QUICK.items() if key != "adapter.rank" or chosen.get("adapter.kind") != "full"
    }
    plain |= {"model.path": str(model), "data.train": str(data), "backend": backend, "training.learning_rate": 0.02}
    plain["evaluation.questions"] = 8  # nearly all rows: what a merged or exported model is compared on
    sections: dict[str, Any] = {}
    for key, value in (plain | chosen).items():
        section, _, name = key.partition(".")
        if name:
            sections.setdefault(section, {})[name] = value
        else:
            sections[section] = value
    return sections
