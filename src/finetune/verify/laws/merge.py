"""Laws of merging: the folder that is written computes what base and adapter do, and nothing else changes."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import (
    accepted,
    adapter_of,
    altered,
    logits_of,
    marks,
    refused,
    same_logits,
    spoilt_adapter,
    train,
    weights_of,
)
from finetune.verify.subjects.answers import Folder, TokenRows
from finetune_strategies.cases import merge as cases
from finetune_strategies.cases.adapter import Spoilt
from finetune_strategies.cases.learned import QUICK, Learned
from finetune_strategies.cases.rows import PLAIN, TINY
from finetune_strategies.recipes import CONTROL_TOKENS


def _tied(trainer: SubjectClient, model: Path) -> Path:
    """A copy of a model whose embedding table is its head, too."""
    folder = altered(trainer, model, {"tie_word_embeddings": True})
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _base(trainer: SubjectClient, case: cases.Merging) -> Path:
    model = trainer.model(case.model)
    return _tied(trainer, model) if case.tied else model


def _merged(trainer: SubjectClient, model: Path, case: Learned) -> tuple[str, Path]:
    adapter = adapter_of(train(trainer, model, case.settings, case.values))
    given = {"model": model, "settings": case.settings, "adapter": adapter}
    return adapter, Path(trainer.ask("merge", Folder, **given).folder)


@law("merge.computes", ["train", "merge", "adapter_weights"], cases.MERGING, examples=6, cost=4)
@oracle("the merged folder and, beside it, base and adapter, both in float64")
def merged_computes_the_same(trainer: SubjectClient, case: cases.Merging) -> None:
    """A merged model, read from its folder, computes what its base does with the adapter, not what the base does."""
    model = _base(trainer, case)
    adapter, folder = _merged(trainer, model, case)
    weights, _ = weights_of(trainer, model, adapter)
    wanted = logits_of(trainer.oracle, "logits_with", model, file=weights.file, scale=weights.scale)
    found = accepted(lambda: logits_of(trainer.oracle, "logits", folder), "the merged model")
    base = logits_of(trainer.oracle, "logits", model)
    same_logits(found, wanted, "the logits of base and adapter", most=1e-4)
    check(not np.allclose(found, base, rtol=1e-3, atol=1e-3), expected="other logits than the base's", got="the base's")


@law("merge.exact", ["train", "merge", "adapter_weights"], cases.MERGE_EXACT, examples=3, cost=3)
@oracle("the sum in float64, which float32 rounds by 10^-6 of its largest part")
def merging_is_exact(trainer: SubjectClient, case: cases.Merging) -> None:
    """Merging adds s B A to the weights in float32 at least, and leaves every other weight bit by bit."""
    model = _base(trainer, case)
    adapter, folder = _merged(trainer, model, case)
    weights, parts = weights_of(trainer, model, adapter)
    base = load_file(model / "model.safetensors")
    merged = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    check(merged.keys() == base.keys(), expected=sorted(base), got=sorted(merged))
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in parts:
            check(np.array_equal(merged[name], weight), expected=f"{name} as it was", got="another")
            continue
        down, up = (parts[f"{stem}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        wanted = weight + weights.scale * (up @ down)
        off = float(np.abs(merged[name] - wanted).max())
        most = 1e-6 * float(np.abs(wanted).max() + np.abs(weights.scale * up).max() * np.abs(down).max())
        check(off <= most, expected=f"{name} within {most:.2g}", got=f"off by {off:.2g}")


@law("merge.half", ["train", "merge", "adapter_weights"], cases.MERGE_HALF, examples=2, cost=3)
@oracle("the sum in float64; float16 has a number within 2^-11 of it, and may be one further after a sum in float16")
def merging_in_half_rounds_once(trainer: SubjectClient, case: cases.Halved) -> None:
    """Merged into a base in float16 every weight is the sum as float16 holds it, and nothing coarser."""
    model = altered(trainer, trainer.model(case.model), {"dtype": "float16", "torch_dtype": "float16"})
    base = {name: tensor.astype(np.float16) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(base, model / "model.safetensors", metadata={"format": "pt"})
    adapter, folder = _merged(trainer, model, case)
    weights, parts = weights_of(trainer, model, adapter)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            wanted = base[name].astype(np.float64)
            if f"{stem}.lora_A.weight" in parts:
                down, up = (parts[f"{stem}.lora_{part}.weight"].astype(np.float64) for part in "AB")
                wanted = wanted + weights.scale * (up @ down)
            off = np.abs(tensor.astype(np.float64) - wanted)
            near = off <= np.maximum(np.abs(wanted), np.abs(base[name])) * 2.0**-10 + 2.0**-24
            check(near.all(), expected=f"{name} as float16 holds it", got=f"off by {off[~near].max(initial=0):.2g}")


@law("merge.rows", ["train", "merge"], cases.MERGE_ROWS, examples=4, cost=3)
@oracle("the base's own tables")
def rows_of_learned_tokens_alone_change(trainer: SubjectClient, case: cases.Named) -> None:
    """Of the embedding and the head the rows of tokens that are to be learned change, and no other."""
    model = _base(trainer, case)
    _, folder = _merged(trainer, model, case)
    base = load_file(model / "model.safetensors")
    merged = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    check(merged.keys() == base.keys(), expected=sorted(base), got=sorted(merged))
    for name in sorted(base.keys() & {"model.embed_tokens.weight", "lm_head.weight"}):
        moved = np.flatnonzero((merged[name] != base[name]).any(axis=1)).tolist()
        learned = [CONTROL_TOKENS.index(case.token)]
        check(moved == learned, expected=f"rows {learned} of {name} are others", got=f"rows {moved}")


@law("merge.damaged", ["train", "merge"], cases.MERGE_DAMAGED, examples=4, cost=3)
@oracle("the names and shapes of the tensors that were trained")
def damaged_adapter_is_not_merged(trainer: SubjectClient, case: Spoilt) -> None:
    """An adapter of which a tensor is missing, renamed, too many, or of another shape or layer is not merged."""
    model = trainer.model(case.model)
    adapter = adapter_of(train(trainer, model, case.settings, case.values))
    spoilt = str(spoilt_adapter(adapter, case.how, case.which, trainer.folder() / "adapter"))
    given = {"model": model, "settings": case.settings, "adapter": spoilt}
    found = refused(lambda: trainer.ask("merge", Folder, **given))
    check(found is None, expected=f"an adapter with a tensor {case.how} is refused", got="a merged model")


@law("merge.leaves", ["train", "merge"], cases.MERGE_LEAVES, examples=2, cost=3)
@oracle("the bytes of both before and after")
def merging_leaves_the_base(trainer: SubjectClient, case: cases.Merging) -> None:
    """Merging changes neither the base nor the adapter."""
    model = altered(trainer, trainer.model(case.model), {})
    before = marks(model)
    adapter = adapter_of(train(trainer, model, case.settings, case.values))
    trained = marks(Path(adapter))
    trainer.ask("merge", Folder, model=model, settings=case.settings, adapter=adapter)
    check(marks(model) == before, expected="the base as it was", got="another")
    check(marks(Path(adapter)) == trained, expected="the adapter as it was", got="another")


@law("merge.whole", ["train", "merge"], cases.MERGE_WHOLE, examples=2, cost=3)
@oracle("our own reader of both folders")
def merged_folder_is_a_model(trainer: SubjectClient, case: Learned) -> None:
    """A merged folder is a model: its tokenizer and its template make of rows what the base's make of them."""
    model = trainer.model(case.model)
    _, folder = _merged(trainer, model, case)
    settings = {**QUICK, "template.name": "tokenizer"}

    def read(place: Path) -> TokenRows:
        return trainer.oracle.ask("tokenize", TokenRows, model=place, settings=settings, rows=case.values)

    found = accepted(lambda: read(folder), "the merged folder as a model")
    check(found.rows == read(model).rows, expected="the rows of the base", got=found.rows)


@law("merge.overflow", ["train", "merge_as"], cases.MERGE_OVERFLOW, examples=3, cost=3)
@oracle("float16 ends at 65504")
def merged_weight_is_finite(trainer: SubjectClient, case: cases.Large) -> None:
    """No weight becomes infinite in the type that a merged model is written in: what does not fit is refused."""
    model = altered(trainer, trainer.model(case.model), {})
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1, 0] = case.size
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_of(train(trainer, model, case.settings, case.values))
    given = {"model": model, "settings": case.settings, "adapter": adapter, "dtype": "float16"}
    merged = refused(lambda: trainer.ask("merge_as", Folder, **given))
    if merged is not None:
        for file in Path(merged.folder).glob("*.safetensors"):
            odd = [name for name, tensor in load_file(file).items() if not np.isfinite(tensor).all()]
            check(not odd, expected="finite weights, or a refusal", got=odd)


@law("merge.tied_apart", ["train", "merge", "logits"], cases.MERGE_TIED_APART, examples=1, cost=3)
@oracle("the logits before and after the folder was written")
def tied_table_stays_whole(trainer: SubjectClient, case: Learned) -> None:
    """A table that is embedding and head in one is not trained apart from itself, or comes back so from the disk."""
    model = _tied(trainer, trainer.model(TINY))
    settings = {**case.settings, "adapter.modules_to_save": ["embed_tokens"]}
    course = refused(lambda: train(trainer, model, settings, case.values))
    if course is None:
        return
    given = {"settings": settings, "adapter": adapter_of(course)}
    wanted = accepted(lambda: logits_of(trainer, "logits", model, **given), "the adapter that was just saved")
    folder = trainer.ask("merge", Folder, model=model, **given).folder
    same_logits(logits_of(trainer.oracle, "logits", folder, settings=PLAIN), wanted, "the logits before merging")
