"""Laws of adapters in files: what is loaded is what was trained, and what does not fit is refused."""

from pathlib import Path
from typing import Any

import numpy as np

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import (
    accepted,
    adapter_of,
    logits_of,
    marks,
    refused,
    same_logits,
    spoilt_adapter,
    train,
    weights_of,
)
from finetune.verify.subjects.answers import TrainableNames, Weights
from finetune_strategies.cases import adapter as cases
from finetune_strategies.cases.learned import Learned
from finetune_strategies.cases.rows import PLAIN, TINY
from finetune_strategies.recipes import ModelRecipe


@law("adapter.travels", ["train", "logits", "adapter_weights"], cases.ADAPTER_TRAVELS, examples=10, cost=4)
@oracle("the base in float64 with s B A added; s is that of the settings")
def adapter_travels(trainer: SubjectClient, case: Learned) -> None:
    """An adapter that was saved and loaded computes what was trained, with the strength that it was trained with."""
    model = trainer.model(case.model)
    adapter = adapter_of(train(trainer, model, case.settings, case.values))
    weights, _ = weights_of(trainer, model, adapter)
    rank, alpha = (case.settings.get(f"adapter.{each}", 1) for each in ("rank", "alpha"))
    scale = alpha / (rank**0.5 if case.kind == "rank-stabilised" else rank)
    check(abs(weights.scale - scale) <= 1e-6, expected=f"scale {scale}", got=weights.scale)
    given = {"settings": case.settings, "adapter": adapter}
    found = accepted(lambda: logits_of(trainer, "logits", model, **given), "the adapter that was just saved")
    wanted = logits_of(trainer.oracle, "logits_with", model, file=weights.file, scale=scale)
    base = logits_of(trainer.oracle, "logits", model)
    check(not np.allclose(wanted, base, rtol=1e-3, atol=1e-3), expected="an adapter that was trained", got="the base")
    same_logits(found, wanted, "the logits of base and adapter")


@law("adapter.damaged", ["train", "logits"], cases.ADAPTER_DAMAGED, examples=8, cost=3)
@oracle("the names and shapes of the tensors that were trained")
def damaged_adapter_is_refused(trainer: SubjectClient, case: cases.Spoilt) -> None:
    """An adapter of which a tensor is missing, renamed, of another shape or too many is refused."""
    model = trainer.model(case.model)
    adapter = adapter_of(train(trainer, model, case.settings, case.values))
    spoilt = str(spoilt_adapter(adapter, case.how, case.which, trainer.folder() / "adapter"))
    found = refused(lambda: logits_of(trainer, "logits", model, settings=case.settings, adapter=spoilt))
    check(found is None, expected=f"an adapter with a tensor {case.how} is refused", got="an answer")


@law("adapter.other_base", ["train", "logits"], cases.ADAPTER_OTHER_BASE, examples=2, cost=3)
@oracle("the layers of the two bases, which are not the same")
def other_base_is_refused(trainer: SubjectClient, case: Learned) -> None:
    """An adapter is refused on a base that it was not trained on and does not fit."""
    deep = trainer.model(ModelRecipe(layers=2))
    adapter = adapter_of(train(trainer, deep, case.settings, case.values))
    found = refused(lambda: logits_of(trainer, "logits", trainer.model(TINY), settings=PLAIN, adapter=adapter))
    check(found is None, expected="an adapter for two layers is refused on a base of one", got="an answer")


@law("adapter.frozen", ["trainable", "train"], cases.ADAPTER_FROZEN, examples=3, cost=2)
@oracle("the names of the adapter's tensors, as PEFT's files have them")
def loaded_adapter_is_frozen(trainer: SubjectClient, case: Learned) -> None:
    """A fresh adapter is all that training changes, and one that was loaded to answer with is changed by nothing."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": case.settings}
    wanted = trainer.oracle.tensors(trainer.oracle.ask("initial_adapter", Weights, **given).file)
    fresh = trainer.ask("trainable", TrainableNames, **given).names
    check(sorted(fresh) == sorted(wanted), expected=f"{len(wanted)} tensors", got=f"{len(fresh)}: {fresh[:3]}")
    adapter = adapter_of(train(trainer, rows=case.values, **given))
    loaded = trainer.ask("trainable", TrainableNames, adapter=adapter, **given).names
    check(not loaded, expected="nothing of a loaded adapter", got=loaded[:3])


@law("adapter.complete", ["train", "adapter_weights"], cases.ADAPTER_COMPLETE, examples=5, cost=2)
@oracle("names and shapes as PEFT's files have them")
def adapter_is_complete(trainer: SubjectClient, case: Learned) -> None:
    """A finished adapter has every tensor of every layer that it was to be on, and of every module trained whole."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": case.settings}
    _, found = weights_of(trainer, given["model"], adapter_of(train(trainer, rows=case.values, **given)))
    wanted = trainer.oracle.tensors(trainer.oracle.ask("initial_adapter", Weights, **given).file)
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    for name, tensor in wanted.items():
        check(shapes.get(name) == list(tensor.shape), expected=f"{name} {list(tensor.shape)}", got=shapes.get(name))


@law("adapter.blocks", ["initial_adapter"], cases.ADAPTER_BLOCKS, examples=5)
@oracle("the number of blocks that the model was made with")
def adapter_sits_on_every_block(trainer: SubjectClient, case: cases.Deep) -> None:
    """An adapter sits on the layers that are named in every block of the model, from the first to the last."""
    given = {**PLAIN, "adapter.target_modules": list(case.layers)}
    model = trainer.model(ModelRecipe(layers=case.blocks))
    file = trainer.ask("initial_adapter", Weights, model=model, settings=given).file
    found = sorted({name.split(".lora_")[0].partition("model.layers.")[2] for name in trainer.tensors(file)})
    places = [(block, name.rpartition(".")[2]) for block, _, name in (each.partition(".") for each in found)]
    wanted = sorted((str(block), layer) for block in range(case.blocks) for layer in case.layers)
    check(sorted(places) == wanted, expected=f"layers {wanted}", got=f"layers {sorted(places)}")


@law("adapter.placeless", ["train"], cases.ADAPTER_PLACELESS, examples=3, cost=2)
@oracle("the folders that the model and the run lie in")
def adapter_tells_no_place(trainer: SubjectClient, case: Learned) -> None:
    """No file of an adapter names a place on the machine that it was trained on."""
    model = trainer.model(case.model)
    folder = Path(adapter_of(train(trainer, model, case.settings, case.values)))
    places = {str(place) for place in (model.parent, folder.parent)}
    told = [name for name, content in marks(folder).items() if any(place.encode() in content for place in places)]
    check(not told, expected="no file that names a folder of this machine", got=f"one is named in {told}")
