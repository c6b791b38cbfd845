"""Answers for our trainer about results: merged models, exports, recipes for servers, and what an oracle computes.

What has to come out is computed by the reference backend alone, from weights that a trainer has shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.adapters.kinds import kind_of_tensors, layer_tensor
from finetune.adapters.peft_files import WEIGHTS, on_disk, read_settings
from finetune.backends import open_backend
from finetune.backends.reference.session import ReferenceSession
from finetune.chat.encoder import Encoder
from finetune.config import ModelAndDataFacts, resolve
from finetune.errors import ExportError, RefusedError
from finetune.events import StepDone
from finetune.export import blueprint, gguf_source
from finetune.export.families import to_gguf_layout
from finetune.export.gguf import plan_whole
from finetune.export.import_gguf import import_gguf
from finetune.export.merged_folder import plan_weights, write_merged
from finetune.export.result import Result
from finetune.export.sources import AdapterWeights
from finetune.export.vocabulary import describe_vocabulary
from finetune.export.write import write_gguf
from finetune.files import make_folder
from finetune.memory.forecast import PARTS, forecast_memory
from finetune.memory.framework import framework_of
from finetune.memory.load import planned_load
from finetune.models.locate import locate_model
from finetune.ports import Session
from finetune.records import Conversation
from finetune.run.folder import RunFolder
from finetune.serve import recipe
from finetune.serve.go_template import GoTemplate
from finetune.train import training_events
from finetune.training.prepare import adapter_target, planned_shape
from finetune.verify.subjects.serving import UnsupportedError
from finetune.verify.trainers.ours_sessions import Answer, Given, Handler, OurSessions, Prompts

_TEXTS = ("ab", " a b ", "\n", "{{ .System }}", "1 2", "")


def result_handlers(trainer: OurSessions) -> dict[str, Handler]:
    """A function for each ability."""
    hands = _ResultHandlers(trainer)
    names = (
        "trainable",
        "merge",
        "merge_as",
        "describe_export",
        "plan_export",
        "import_back",
        "serving",
        "render_served",
        "estimate",
        "logits_with",
        "train_from",
    )
    return {name: getattr(hands, name) for name in names}


def put_weights(session: Session, file: str) -> None:
    """Let training begin with these weights of an adapter, in the names of PEFT's files.

    Raises:
        UnsupportedError: the backend is not the oracle's.
    """
    if not isinstance(session, ReferenceSession) or session.adapter is None:
        raise UnsupportedError("only the reference backend begins with given weights")
    given = load_file(file)
    for name, tensor in session.adapter.tensors().items():
        tensor[...] = given[on_disk(name)]


class _ResultHandlers:
    """The handlers; each goes the way of the command of its name."""

    def __init__(self, trainer: OurSessions) -> None:
        self._trainer = trainer

    def trainable(self, model: str, settings: Given, adapter: str | None = None) -> Answer:
        """What training would change: of a fresh adapter, or of one that was loaded to answer with."""
        if adapter is not None:
            session = self._trainer.answering_session(model, settings, adapter)
        else:
            session = self._trainer.fresh_session(self._prepared(model, settings))
        return {"names": [on_disk(name) for name in session.trainable_names()]}

    def merge(self, model: str, settings: Given, adapter: str) -> Answer:
        """`ft merge`, each weight in the type of the base."""
        return self.merge_as(model, settings, adapter, None)

    def merge_as(self, model: str, settings: Given, adapter: str, dtype: str | None) -> Answer:
        """`ft merge --dtype`."""
        result, folder = self._result(model, settings, adapter), self._trainer.new_folder()
        write_merged(result, plan_weights(result, cast("Any", dtype)), folder)
        return {"folder": str(folder)}

    def describe_export(self, model: str, settings: Given, adapter: str | None = None) -> Answer:
        """What `ft export` settles before it writes, but for GGUF's own names of tensors."""
        exportable = self._exportable(model, adapter)
        keys = describe_vocabulary(exportable.tokenizer.description(), exportable.special, exportable.rows)
        metadata = {**exportable.described.metadata, **gguf_source.file_metadata(exportable, keys)}
        source = exportable.source
        weights = {
            name: to_gguf_layout(exportable.described, name, source.read(name)) for name in exportable.shape.weights
        }
        weights |= exportable.described.extra
        file = self._trainer.new_folder() / "stored.safetensors"
        save_file({name: np.ascontiguousarray(weight) for name, weight in weights.items()}, file)
        return {"metadata": metadata, "file": str(file)}

    def plan_export(
        self, model: str, settings: Given, outtype: str, adapter: str | None = None, *, alone: bool = False
    ) -> Answer:
        """The GGUF file before it is written."""
        exportable = self._exportable(model, adapter)
        described, shape, kind = exportable.described, exportable.shape, cast("Any", outtype)
        keys = describe_vocabulary(exportable.tokenizer.description(), exportable.special, exportable.rows)
        metadata = gguf_source.file_metadata(exportable, keys)
        if alone:
            assert exportable.adapter is not None
            planned = blueprint.plan_adapter(described, shape, exportable.adapter, exportable.naming, kind)
        else:
            planned = blueprint.plan_model(described, shape, exportable.source, metadata, kind)
        return {
            "metadata": dict(planned.metadata),
            "tensors": {tensor.name: list(tensor.shape) for tensor in planned.tensors},
        }

    def import_back(self, model: str, settings: Given, outtype: str) -> Answer:
        """`ft import` of the file that `ft export` writes of a model."""
        if find_spec("gguf") is None:
            raise UnsupportedError("reading GGUF needs the gguf extra")
        folder, kind = self._trainer.new_folder(), cast("Any", outtype)
        write_gguf(plan_whole(self._exportable(model, None), kind), folder / "model.gguf")
        try:
            return {"folder": str(import_gguf(folder / "model.gguf", output=folder / "back").path)}
        except ExportError as error:  # its own checks leave no folder
            raise RefusedError(error.message) from None

    def serving(self, model: str, settings: Given, license: str = "") -> Answer:
        """What `ft deploy --to ollama` sends and leaves, but for the file of weights."""
        encoder, folder = self._encoder(model, settings), self._trainer.new_folder()
        tokenizer = encoder.tokenizer
        bos = tokenizer.bos if tokenizer.adds_bos else ""

        def render(conversation: Conversation) -> str:
            return encoder.template.render_prompt(conversation).text

        stops = [token for token in tokenizer.control_tokens if tokenizer.control_id(token) in encoder.stop_ids]
        made = recipe.make_recipe(render, bos=bos, texts=_TEXTS, context=64, stops=stops, licence=license)
        make_folder(RunFolder(folder).deploy)
        recipe.leave_recipe(folder, Path("model.gguf"), made)
        return {"modelfile": str(RunFolder(folder).deploy / "Modelfile"), "template": made.template}

    def render_served(self, template: str, messages: Sequence[Mapping[str, str]]) -> Answer:
        """What Ollama makes of a conversation by a template in its language."""
        return {"text": GoTemplate(template).render(messages)}

    def estimate(self, model: str, settings: Given) -> Answer:
        """`ft estimate` without rows of one's own, on the backend that the settings name."""
        loaded = self._trainer.loaded(model, settings)
        config = loaded.config
        shape = planned_shape(config, locate_model(model))
        facts = ModelAndDataFacts(shape.context_length, has_chat_template=True, train_rows=1)
        length = resolve(loaded, facts).config.tokens.max_length
        assert length is not None
        load = planned_load(config.training, length)
        target, framework = adapter_target(config, shape), framework_of(config.backend)
        found = forecast_memory(shape, target, config.model.dtype, load, framework)
        return {
            "trainable": found.trainable_parameters,
            "parts": {part: getattr(found.expected, part) for part in PARTS},
            "total": found.expected.total,
        }

    def logits_with(self, model: str, settings: Given, prompts: Prompts, file: str, scale: float) -> Answer:
        """Logits of the base with these weights of an adapter, multiplied with this scale.

        Raises:
            UnsupportedError: the backend is not the oracle's.
        """
        session = self._trainer.answering_session(model, settings, None)
        if not isinstance(session, ReferenceSession):
            raise UnsupportedError("only the reference backend computes with given weights")
        _put_on(session.weights, load_file(file), scale)
        out = self._trainer.new_folder() / "logits.safetensors"
        session.save_logits(prompts, out)
        return {"file": str(out)}

    def train_from(self, model: str, settings: Given, rows: Sequence[Given], file: str) -> Answer:
        """A run that begins with these weights of an adapter."""
        prepared = self._trainer.prepared(model, settings, rows)
        session, folder = self._trainer.fresh_session(prepared), self._trainer.new_folder()
        put_weights(session, file)
        run = self._trainer.run(prepared, folder)
        run.settle_objective(session)
        done = [event for event in training_events(run, session, prepared.training_rows) if isinstance(event, StepDone)]
        (folder / "adapter").mkdir()
        session.save_adapter(folder / "adapter")
        steps = [{"step": each.step, "loss": each.loss, "learning_rate": each.learning_rate} for each in done]
        return {"steps": steps, "adapter": str(folder / "adapter")}

    def _prepared(self, model: str, settings: Given) -> Any:
        return self._trainer.prepared(model, settings, [{"prompt": "a", "completion": "b"}])

    def _encoder(self, model: str, settings: Given) -> Encoder:
        return Encoder(locate_model(model), self._trainer.loaded(model, settings).config.template.name)

    def _result(self, model: str, settings: Given, adapter: str) -> Result:
        """A run's result as it is after `ft train`, which lays the template beside the adapter."""
        encoder, folder = self._encoder(model, settings), self._trainer.new_folder()
        saved = folder / "adapter"
        saved.mkdir()
        for file in Path(adapter).iterdir():
            (saved / file.name).write_bytes(file.read_bytes())
        (saved / "chat_template.jinja").write_text(encoder.source.jinja, encoding="utf-8")
        settings_file = saved / "generation_config.json"
        settings_file.write_text(json.dumps(encoder.generation_settings()), encoding="utf-8")
        config = self._trainer.loaded(model, settings).config
        location = locate_model(model)
        manifest = {
            "id": "asked",
            "outcome": "not judged",
            "versions": {"finetune-suite": version("finetune-suite")},
            "model": {"name": location.name, "source": location.source, "files": []},
            "plan": [{"key": "adapter.kind", "value": config.adapter.kind, "origin": "flag"}],
            "data": {"files": []},
            "training": {"steps": 0, "kept_step": 0},
            "losses": {"held_out": []},
        }
        return Result(RunFolder(folder), config, manifest, location, saved, encoder, open_backend)

    def _exportable(self, model: str, adapter: str | None) -> gguf_source.Exportable:
        exportable = gguf_source.exportable_model(model, lambda: self._trainer.backend)
        if adapter is None:
            return exportable
        folder = Path(adapter)
        return replace(exportable, adapter=AdapterWeights(folder / WEIGHTS, read_settings(folder, transposed=False)))


def _put_on(weights: dict[str, Any], given: Mapping[str, Any], scale: float) -> None:
    """Merge an adapter, of whichever kind its tensors are, into weights, in float64."""
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in given.items():
        if found := layer_tensor(name):
            layers.setdefault(found.path, {})[found.tensor.key] = tensor.astype(np.float64)
        else:
            weights[name.removeprefix("base_model.model.")] = tensor.astype(np.float64)
    for path, parts in layers.items():
        weight = weights[f"{path}.weight"]
        weights[f"{path}.weight"] = kind_of_tensors(parts).merged(np, parts, scale, weight)
