"""Figures that were held against measured peaks do not move by accident.

`memory_figures.json` holds them. After a change that is meant, and measured: FT_WRITE_FIGURES=1 pytest
tests/properties/test_memory_figures.py, and read the difference.
"""

import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.memory.estimate import estimate_memory
from finetune.memory.forecast import forecast_memory
from finetune.memory.framework import FRAMEWORKS
from finetune.memory.kept import kept_by_torch
from finetune.memory.kept_reference import kept_by_reference
from finetune.memory.load import StepLoad, full_load
from finetune.records import AdapterTarget
from support.transformer_shapes import Sizes

GOLDEN = Path(__file__).with_name("memory_figures.json")
SIZES = {
    "llama": Sizes("llama", hidden=23, inner=71, heads=5, kv_heads=1, head_dim=6, layers=3, vocab=101),
    "llama tied": Sizes("llama", hidden=24, inner=66, heads=6, kv_heads=3, head_dim=4, layers=2, vocab=607, tied=True),
    "gpt2": Sizes("gpt2", hidden=20, inner=83, heads=5, kv_heads=5, head_dim=4, layers=3, vocab=307, tied=True),
    "gpt2 dropping": Sizes(
        "gpt2",
        hidden=20,
        inner=83,
        heads=5,
        kv_heads=5,
        head_dim=4,
        layers=2,
        vocab=307,
        attention_dropout=0.1,
        hidden_dropout=0.1,
    ),
    "other": Sizes("other", hidden=22, inner=57, heads=2, kv_heads=1, head_dim=8, layers=3, vocab=211),
}
LOADS = {
    "short": full_load(7, 3),
    "full": full_load(3, 37),
    "added up": full_load(2, 300, accumulation=3),
    "padded": StepLoad(rows=5, length=41, targets=7, masked=True),
}


def figures() -> dict[str, Any]:
    """Every part of every forecast, by what it is of."""
    found: dict[str, Any] = {}
    for (name, sizes), (how, load), dtype in itertools.product(SIZES.items(), LOADS.items(), ("float32", "bfloat16")):
        shape = sizes.shape
        some = AdapterTarget(3, 7.0, 0.0, sizes.names()[:2])
        targets = {"full": None, "lora": AdapterTarget(3, 7.0, 0.0, sizes.names()), "some": some}
        targets["dropping"] = AdapterTarget(5, 7.0, 0.2, sizes.names())
        for method, target in targets.items():
            forecast = forecast_memory(shape, target, dtype, load, FRAMEWORKS["torch"])
            found[f"{name}, {how}, {dtype}, {method}"] = [
                asdict(forecast),
                asdict(kept_by_torch(shape, target, dtype, load)),
            ]
            if name.startswith("llama") and dtype == "float32":
                kept = kept_by_reference(shape, target, load)
                exact = estimate_memory(shape, target, "float64")
                other = forecast_memory(shape, target, dtype, load, FRAMEWORKS["reference"])
                found[f"{name}, {how}, reference, {method}"] = [asdict(kept), asdict(exact), asdict(other)]
    return json.loads(json.dumps(found))


def test_memory_figures_are_those_that_were_measured() -> None:
    """Every part of 192 forecasts, over architectures, loads, dtypes and adapters, is what it was."""
    found = figures()
    if "FT_WRITE_FIGURES" in os.environ:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
        GOLDEN.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert {name for name in found if found[name] != golden.get(name)} == set()
    assert len(found) == len(golden) == 192
