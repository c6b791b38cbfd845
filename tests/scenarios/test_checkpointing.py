"""Laws of gradient checkpointing: blocks that are computed again learn the same, to the last bit, in less memory."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.errors import ModelError
from finetune.records import Batch, ModelLocation, Optimization
from support.sessions import (
    FRAMEWORKS,
    Bench,
    accumulated,
    adapter_bytes,
    all_logits,
    batches_of,
    make_model,
    make_rows,
    need,
    shake,
    step,
    train_a_little,
)

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
HOW = {again: Optimization(0.05, 1.0, gradient_checkpointing=again) for again in (False, True)}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each kind of model in each backend that can; GPT-2 has dropout of its own in torch."""
    need(request.param.partition("-")[0])
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "saved", "full"])
def test_recomputing_changes_no_bit_of_a_gradient(bench: Bench, kind: str) -> None:
    """Loss and every gradient are the same to the last bit, whatever is trained, with dropout and packed rows too."""
    # GPT-2 has a table of positions, of which packed rows would need more than there are.
    packed, found = [Batch(ROWS, packed=(3, 4))] if bench.kind == "llama" else [], []
    for optimization in HOW.values():
        session = bench.adapted(bench.kinds(dropout=0.4)[kind], optimization=optimization)
        shake(session)
        session.reseed(3)
        found.append(accumulated(session, *batches_of(ROWS, 3), *packed))
    (loss, kept), (again, recomputed) = found
    assert loss == again
    assert kept.keys() == recomputed.keys()
    assert {name for name in kept if not np.array_equal(kept[name], recomputed[name])} == set()
    assert max(np.abs(value).max() for value in kept.values()) > 0


def test_recomputed_run_ends_as_the_same_run(bench: Bench, tmp_path: Path) -> None:
    """Steps, a checkpoint that the other way goes on from, and looks between them end in the same bytes."""
    target, files = bench.target(dropout=0.3), []
    for number, (first, then) in enumerate([(False, False), (True, False), (False, True)]):
        session = bench.adapted(target, optimization=HOW[first])
        train_a_little(session)
        (tmp_path / f"state-{number}").mkdir()
        session.save_state(tmp_path / f"state-{number}")
        session = bench.adapted(target, optimization=HOW[then], seed=9)
        session.load_state(tmp_path / f"state-{number}")
        looked = all_logits(session)
        step(session, batches_of(ROWS, 3))
        assert not np.array_equal(all_logits(session), looked)
        files.append(adapter_bytes(session, tmp_path / f"adapter-{number}"))
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_recomputing_takes_less_memory(backend: str, tmp_path: Path) -> None:
    """Of a deep model live tensors peak at less than half: what grows with its depth is a block's input alone."""
    need(backend)
    bench = make_model(f"{backend}-llama", tmp_path, num_hidden_layers=12)
    probe: Any = import_module(f"finetune.backends.{backend}.probe")
    batch, peaks = Batch(make_rows(24)), []
    for optimization in HOW.values():
        session = bench.adapted(bench.target(), optimization=optimization)
        step(session, [batch])
        peaks.append(probe.peak_tensors(session, batch) - probe.weight_bytes(session))
    assert peaks[1] < 0.5 * peaks[0]


def test_architecture_that_cannot_is_refused(tmp_path: Path) -> None:
    """Where transformers or mlx-lm have no blocks to compute again, the run is refused before its first step."""
    need("torch")
    from finetune.backends.torch.backend import TorchBackend

    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "dff": 16, "n_positions": 32, "vocab_size": 97}
    TorchBackend().create({"model_type": "ctrl", **sizes}, tmp_path, 0)
    session = TorchBackend().open(ModelLocation("ctrl", tmp_path, "local"), "float32", 0)
    session.attach(None, 0)
    session.prepare_updates(HOW[False])
    with pytest.raises(ModelError, match="transformers' CTRLLMHeadModel cannot compute its blocks again") as caught:
        session.prepare_updates(HOW[True])
    assert "set it to false" in caught.value.hint


def test_model_without_blocks_is_refused_and_others_are_left_alone(tmp_path: Path) -> None:
    """mlx-lm's classes are what they were after a step; a model that names no blocks is refused."""
    need("mlx")
    from mlx import nn

    from finetune.backends.mlx.recompute import blocks_of

    session = make_model("mlx-llama", tmp_path).adapted(optimization=HOW[True])
    kinds = [type(block) for block in blocks_of(session.loaded.model).values()]
    step(session, batches_of(ROWS, 3))
    assert [type(block) for block in blocks_of(session.loaded.model).values()] == kinds
    assert len(kinds) == 2
    odd = nn.Linear(2, 2)
    odd.model_type = "odd"
    with pytest.raises(ModelError, match="mlx-lm's odd names no blocks of its own"):
        blocks_of(odd)
