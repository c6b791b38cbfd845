"""Laws of dropout in the reference backend: on every adapted layer, in training only, drawn anew each step."""

from dataclasses import replace

import pytest

from support.tiny_llamas import BATCH, DROPPING, LINEAR, adapted


@pytest.mark.parametrize("layer", LINEAR)
def test_dropout_acts_on_every_layer_that_is_adapted(layer: str) -> None:
    """P-KNOB: with an adapter on one kind of layer alone, its dropout changes the loss in training and not at rest."""
    assert len(LINEAR) == 7
    dropping, plain = (
        adapted(replace(DROPPING, dropout=share, modules=(layer,)), trained=True) for share in (0.4, 0.0)
    )
    assert dropping.loss(BATCH) == plain.loss(BATCH) == plain.accumulate(BATCH, 1.0)
    assert abs(dropping.accumulate(BATCH, 1.0) - plain.loss(BATCH)) > 1e-6


def test_dropout_is_drawn_anew_for_every_batch() -> None:
    """The same rows and weights have another loss each time they are trained on: no mask is drawn twice."""
    session = adapted(DROPPING, trained=True)
    assert len({session.accumulate(BATCH, 1.0) for _ in range(5)}) == 5
