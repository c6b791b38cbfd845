"""Laws of what others may hand to a trainer: nothing in a file is executed, and nothing outside a folder is touched."""

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import adapter_of, altered, logits_of, marks, refused, train
from finetune.verify.subjects.answers import Accepted, RenderedText, TrainingResult
from finetune.verify.subjects.subject import SubjectError
from finetune_strategies.cases import safety as cases
from finetune_strategies.cases.learned import QUICK
from finetune_strategies.cases.rows import PLAIN, TINY
from finetune_strategies.recipes import ModelRecipe

_SHOWN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@law("safety.template", ["render"], cases.SAFETY_TEMPLATE, examples=11)
@oracle("no chat template needs an attribute that begins with _, or millions of letters for two")
def hostile_template_is_refused(trainer: SubjectClient, case: cases.Hostile) -> None:
    """A stranger's template can neither reach what lies behind its data nor take more than its messages call for."""
    file = trainer.folder() / "hostile.jinja"
    file.write_text(case.attack + _SHOWN, encoding="utf-8")
    given = {"model": trainer.model(TINY), "settings": {**PLAIN, "template.name": str(file)}, "prompt": False}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = refused(lambda: trainer.ask("render", RenderedText, messages=messages, **given))
    if found is not None:
        shown = found.text.partition("<|im_start|>")[0]
        check(case.attack in cases.INSIDES and not shown.strip(), expected=f"{case.attack} is refused", got=shown[:200])


def _unseen(ask: Callable[[], object], canary: Path, what: str) -> None:
    with contextlib.suppress(SubjectError):
        refused(ask)
    check(not canary.exists(), expected=f"nothing in {what} is executed", got="it was")


class _Bomb:
    """What is called when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._canary,)


@law("safety.pickle", ["train", "resume", "logits"], cases.SAFETY_PICKLE, examples=5, cost=3)
@oracle("a file that would be there if it had been")
def pickle_is_not_loaded(trainer: SubjectClient, case: cases.Pickled) -> None:
    """A pickle in an adapter or in a checkpoint, by whatever name, is never loaded."""
    canary, model = trainer.folder() / "canary", trainer.model(TINY)
    bomb = pickle.dumps(_Bomb(canary))
    folder = trainer.folder() / "run"
    settings = {**QUICK, "training.save_every": 1, "training.epochs": 3.0}
    given: dict[str, Any] = {"model": model, "settings": settings, "rows": case.values}
    begun = trainer.ask("train", TrainingResult, folder=folder, stop_after=1, **given)
    adapter = Path(adapter_of(train(trainer, **given)))

    def lay(place: Path) -> None:
        within = [place] if place.is_file() else [file for file in place.rglob("*.[!j]*") if file.is_file()]
        for file in [(place if place.is_dir() else place.parent) / case.name] if case.name else within:
            file.write_bytes(bomb)
        for weights in place.rglob("*.safetensors") if case.name == "adapter_model.bin" else ():
            weights.unlink()

    lay(adapter)
    _unseen(lambda: logits_of(trainer, "logits", model, adapter=str(adapter)), canary, "an adapter")
    for checkpoint in begun.checkpoints.values():
        lay(Path(checkpoint))
    _unseen(lambda: trainer.ask("resume", TrainingResult, folder=folder), canary, "a checkpoint")


@law("safety.files", ["logits"], cases.SAFETY_FILES, examples=4)
@oracle("a folder that holds no weights has no answer")
def weights_lie_in_their_folder(trainer: SubjectClient, case: cases.Elsewhere) -> None:
    """The weights of a model are those in its folder: a name or a link that leads out of it is refused."""
    model = altered(trainer, trainer.model(TINY), {})
    elsewhere = trainer.folder() / "other"
    elsewhere.mkdir()
    weights = elsewhere / "weights.safetensors"
    shutil.move(model / "model.safetensors", weights)
    if case.kind == "link":
        (model / "model.safetensors").symlink_to(weights)
    else:
        name = str(weights) if case.kind == "absolute" else f"../../{elsewhere.parent.name}/other/weights.safetensors"
        names = dict.fromkeys(load_file(weights), name)
        index = {"metadata": {}, "weight_map": names}
        (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        # What looks for any weights at all finds some.
        save_file({"unused": np.zeros(1, np.float32)}, model / "none.safetensors")
    found = refused(lambda: logits_of(trainer, "logits", model))
    check(found is None, expected="a refusal", got="an answer computed from a file of another folder")


@law("safety.code", ["logits"], cases.SAFETY_CODE, examples=5)
@oracle("a file that would be there if it had been")
def code_is_not_executed(trainer: SubjectClient, case: cases.Code) -> None:
    """Code that lies beside a model is not executed, whatever key of its files names it."""
    canary = trainer.folder() / "canary"
    named: dict[str, Any] = {"auto_map": {case.name: "modeling_own.Own"}}
    given = {"auto_map": named, "model_file": {"model_file": "modeling_own.py"}}.get(case.key, {})
    model = altered(trainer, trainer.model(TINY), given)
    if case.key == "of the tokenizer":
        file = model / "tokenizer_config.json"
        said = json.loads(file.read_text(encoding="utf-8"))
        said["auto_map"] = {case.name: [None, "modeling_own.Own"]}
        file.write_text(json.dumps(said), encoding="utf-8")
    text = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Own: pass\n"
    (model / "modeling_own.py").write_text(text, encoding="utf-8")
    _unseen(lambda: logits_of(trainer, "logits", model), canary, "a model's folder")


@law("safety.config", ["load_config"], cases.SAFETY_CONFIG, examples=2)
@oracle("a file that would be there if it had been")
def config_makes_no_objects(trainer: SubjectClient, case: cases.Configured) -> None:
    """A configuration file makes no objects but plain values."""
    canary = trainer.folder() / "canary"
    word = str(canary) if "mkdir" in case.tag else f"touch {canary}"
    file = trainer.folder() / "config.yaml"
    file.write_text(f"model:\n  path: !!python/object/{case.tag} [{word!r}]\n", encoding="utf-8")
    _unseen(lambda: trainer.ask("load_config", Accepted, file=str(file)), canary, "a configuration")


@law("safety.links", ["train", "resume"], cases.SAFETY_LINKS, examples=3, cost=3)
@oracle("the files of another folder, before and after")
def links_are_not_followed(trainer: SubjectClient, case: cases.Linked) -> None:
    """A run that is gone on with writes and removes nothing outside its folder."""
    folder, mine = trainer.folder() / "run", trainer.folder() / "mine"
    settings = {**QUICK, "training.save_every": 1, "training.epochs": 4.0}
    given = {"model": trainer.model(ModelRecipe()), "settings": settings, "rows": case.values}
    trainer.ask("train", TrainingResult, folder=folder, stop_after=2, **given)
    place = folder / case.name
    if place.exists():
        shutil.move(place, mine)
    else:
        mine.mkdir()
        (mine / "kept").write_text("kept", encoding="utf-8")
    place.symlink_to(mine)
    before = mine.read_bytes() if mine.is_file() else marks(mine)
    with contextlib.suppress(SubjectError):
        refused(lambda: trainer.ask("resume", TrainingResult, folder=folder))
    after = mine.read_bytes() if mine.is_file() else marks(mine)
    check(after == before, expected="another folder's files as they were", got="they were changed through a link")
