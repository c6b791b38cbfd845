"""Laws of a session whose adapter goes on from a saved one: it is that adapter, trainable, and nothing else is new."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.errors import ModelError
from support.damages import WEIGHTS, damaged_tensors
from support.sessions import (
    BENCHES,
    Bench,
    adapter_bytes,
    all_logits,
    batches_of,
    gradients,
    make_model,
    make_rows,
    put,
    random_state,
    step,
    train_a_little,
    weights,
)
from support.tolerances import apart

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
KINDS = ("lora", "dora", "ia3", "saved")


@pytest.fixture(scope="module", params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each kind of model in each backend that computes it."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_for_no_step_changes_nothing(bench: Bench, tmp_path: Path, kind: str) -> None:
    """Saved again at once, the adapter has the same bytes; its logits and losses are the tuned model's, to the bit."""
    target = bench.kinds()[kind]
    trained = bench.trained(target)
    written = adapter_bytes(trained, tmp_path / "first")
    onward = bench.adapted(target, seed=9)
    fresh = random_state(onward)
    onward.start_from(tmp_path / "first")
    assert str(random_state(onward)) == str(fresh)
    assert adapter_bytes(onward, tmp_path / "again") == written
    loaded = bench.open()
    loaded.load_adapter(tmp_path / "first")
    for mine, other in zip(all_logits(onward), all_logits(loaded), strict=True):
        assert apart(mine, other) == 0
    [batch] = batches_of(ROWS, len(ROWS))
    tuned, base = loaded.loss(batch), bench.open().loss(batch)
    assert onward.loss(batch) == tuned
    # The first loss of training is the tuned model's, whatever the model itself drops, and not the base's.
    same = bench.adapted(target, seed=9)
    put(same, weights(trained))
    found = []
    for session in (onward, same):
        session.reseed(1)  # torch has one source of random numbers for all sessions
        found.append(step(session, [batch], rate=0.0))
    first, wanted = found
    assert first == pytest.approx(wanted, rel=1e-6)  # the reference computes with more digits than a file holds
    assert tuned != base


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_trains_what_a_fresh_adapter_trains(bench: Bench, tmp_path: Path, kind: str) -> None:
    """The same tensors are trainable, all of them have a gradient and move; the base does not."""
    target = bench.kinds()[kind]
    adapter_bytes(bench.trained(target), tmp_path / "first")
    onward, fresh = bench.adapted(target, seed=9), bench.adapted(target)
    onward.start_from(tmp_path / "first")
    assert onward.trainable_names() == fresh.trainable_names()
    before, named = onward.fingerprints(), weights(onward)
    onward.accumulate(batches_of(ROWS, len(ROWS))[0], 0.1)
    slopes = gradients(onward)
    assert set(slopes) == set(named)
    assert all(np.abs(slope).max() > 0 for slope in slopes.values())
    train_a_little(onward)
    after = onward.fingerprints()
    assert {name for name in before if before[name] != after[name]} == set(named)


def _cut(tensors: dict[str, Any]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name][:, :-1]


DAMAGES = {
    "dropped": damaged_tensors(WEIGHTS, lambda each: each.pop(max(each))),
    "added": damaged_tensors(WEIGHTS, lambda each: each.update({"more": np.zeros(3, np.float32)})),
    "cut": damaged_tensors(WEIGHTS, _cut),
    "whole numbers": damaged_tensors(WEIGHTS, lambda each: each.update({min(each): np.zeros((2, 2), int)})),
    "garbage": lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 300) and None,
    "missing": lambda folder: (folder / WEIGHTS).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_going_on_from_what_does_not_fit_is_refused_whole(bench: Bench, tmp_path: Path, damage: str) -> None:
    """A tensor too few, too many, of another shape or of no float is refused, and the fresh adapter stays as it was."""
    adapter_bytes(bench.trained(), tmp_path / "first")
    DAMAGES[damage](tmp_path / "first")
    onward = bench.adapted(seed=9)
    before = onward.fingerprints()
    with pytest.raises(ModelError):
        onward.start_from(tmp_path / "first")
    assert onward.fingerprints() == before
