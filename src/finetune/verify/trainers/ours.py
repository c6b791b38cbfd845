"""Our own trainer as a subject: each question goes through the rooms that `ft train` goes through."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.adapters.peft_files import WEIGHTS, on_disk, read_settings
from finetune.chat.encoder import Encoder
from finetune.config import FORMAT, dump_plan, flatten
from finetune.errors import FineTuneError
from finetune.events import CheckpointSaved, Event, FirstGradients, HeldOutLoss, StepDone
from finetune.evidence.evaluate import evaluate as evaluate_on_file
from finetune.evidence.observe import observe
from finetune.evidence.record import base_files, data_files, run_owner
from finetune.evidence.saved import save_trained
from finetune.files import write_folder, write_text
from finetune.models.locate import locate_model
from finetune.objectives import choose_objective
from finetune.ports import Objective
from finetune.records import Batch, Conversation, Message, TokenizedRow
from finetune.run.checkpoints import CheckpointStore
from finetune.run.folder import RunFolder
from finetune.train import train_to_the_end, training_events
from finetune.training.longer import Longer, lengthen
from finetune.training.loop import LoopPlan, mean_loss, train
from finetune.training.prepare import Prepared, held_out_batches
from finetune.training.resume import claim_resumed
from finetune.verify.subjects.answers import ANSWERS
from finetune.verify.subjects.serving import serve
from finetune.verify.subjects.subject import About, InProcessSubject
from finetune.verify.trainers.ours_files import file_handlers
from finetune.verify.trainers.ours_program import OurProgram
from finetune.verify.trainers.ours_results import put_weights, result_handlers
from finetune.verify.trainers.ours_rows import line_of, row_handlers
from finetune.verify.trainers.ours_sessions import Answer, Given, Handler, OurSessions, Prompts


class OurTrainer(OurSessions):
    """The handlers of all questions, with one backend."""

    def __init__(self, backend: str, scratch: Path) -> None:
        super().__init__(backend, scratch)
        self.program = OurProgram(backend)

    @property
    def handlers(self) -> dict[str, Handler]:
        """A function for each ability."""
        return {
            **{ability: getattr(self, ability) for ability in ANSWERS if hasattr(self, ability)},
            **row_handlers(self),
            **result_handlers(self),
            **file_handlers(self),
            **self.program.handlers,
        }

    def configure(self, model: str, settings: Given) -> Answer:
        """What `ft check` takes."""
        loaded = self.loaded(model, settings)
        return {"told": "", "effective": dict(flatten(loaded.config))}

    def render(self, model: str, settings: Given, messages: Sequence[Given], *, prompt: bool) -> Answer:
        """A conversation as text, or a prompt up to where its answer begins."""
        encoder = Encoder(locate_model(model), self.loaded(model, settings).config.template.name)
        conversation = Conversation(tuple(Message(**message) for message in messages), "asked")
        template = encoder.template
        return {"text": (template.render_prompt if prompt else template.render)(conversation).text}

    def tokenize(self, model: str, settings: Given, rows: Sequence[Given]) -> Answer:
        """Rows as they are trained on."""
        prepared = self.prepared(model, settings, rows)
        found = [
            {"row": line_of(row.where), "ids": list(row.ids), "targets": list(row.trained)}
            for row in prepared.train.rows
        ]
        return {"rows": found, "dropped": dict(prepared.train.counts.dropped)}

    def tokenize_file(self, model: str, settings: Given, file: str) -> Answer:
        """The rows of a file as they are trained on."""
        prepared = self.prepared_of(model, {**settings, "data.train": file})
        places = {where: place for place, where in enumerate(dict.fromkeys(row.where for row in prepared.train.rows))}
        found = [
            {"row": places[row.where], "ids": list(row.ids), "targets": list(row.trained)}
            for row in prepared.train.rows
        ]
        return {"rows": found, "dropped": dict(prepared.train.counts.dropped)}

    def batches(self, model: str, settings: Given, rows: Sequence[Given], epochs: int) -> Answer:
        """What the training loop itself takes."""
        prepared = self.prepared(model, {**settings, "training.epochs": float(epochs)}, rows)
        windows: list[list[Batch]] = [[]]

        def accumulate(batch: Batch, weight: float, *objective: Objective) -> float:
            windows[-1].append(batch)
            return 1.0

        # A session that computes nothing, and has nothing to clip or to move.
        watching: Any = SimpleNamespace(accumulate=accumulate, loss=lambda *given: 1.0, gradient_norms=dict)
        watching.gradients, watching.clip_gradients, watching.update = {}, lambda: 1.0, lambda rate: None
        for event in training_events(self.run(prepared, self.new_folder()), watching, prepared.training_rows):
            if isinstance(event, StepDone):
                windows.append([])
        each = (len(windows) - 1) // epochs
        own: dict[str, list[TokenizedRow]] = {}
        for row in prepared.training_rows:
            own.setdefault(row.where, []).append(row)
        steps = [{"micro": [_micro(batch, own) for batch in window]} for window in windows[:-1]]
        return {"epochs": [steps[start : start + each] for start in range(0, len(steps), each)]}

    def loss(self, model: str, settings: Given, batch: Sequence[Given], adapter: str | None = None) -> Answer:
        """The loss of one batch, dropout off."""
        value, count = mean_loss(self.answering_session(model, settings, adapter), [Batch(_rows(batch))])
        return {"loss": value, "count": count}

    def gradient(
        self, model: str, settings: Given, micro: Sequence[Sequence[Given]], start: str | None = None
    ) -> Answer:
        """The norms that the training loop measures in its first step; so many batches are added up.

        With `start`, the file of an adapter's weights, it is the gradient there (of the oracle alone).
        """
        rows = [_rows(batch) for batch in micro]
        given = {**settings, "training.gradient_accumulation_steps": len(rows), "training.max_steps": 1}
        prepared = self.prepared(model, given, [{"prompt": "a", "completion": "b"}])
        session = self.fresh_session(prepared)
        if start is not None:
            put_weights(session, start)
        window = [Batch(each) for each in rows]
        objective = choose_objective(prepared.plan.config.training, session, ())
        plan = LoopPlan(1, len(window), 1e-3, 0, "constant", 1, objective=objective)
        found: dict[str, Any] = {}
        for event in train(session, lambda epoch: window, (), plan):
            if isinstance(event, FirstGradients):
                found["norms"] = {on_disk(name): norm for name, norm in event.norms.items()}
            elif isinstance(event, StepDone):
                found["loss"] = event.loss
        return found

    def train(
        self, model: str, settings: Given, rows: Sequence[Given], folder: str, stop_after: int | None = None
    ) -> Answer:
        """A run; with `stop_after` it ends, as by Ctrl-C, when the checkpoint of this step is there."""
        prepared = self.prepared(model, settings, rows)
        place = RunFolder.place(Path(folder))
        place.make()
        write_text(place.plan, dump_plan(prepared.plan))
        write_text(place.path / "asked.json", json.dumps({"model": model, "settings": settings, "rows": list(rows)}))
        return self._train_until(prepared, place, stop_after)

    def resume(self, folder: str, stop_after: int | None = None, settings: Given | None = None) -> Answer:
        """Go on with a run that was stopped; `settings` are those that are changed meanwhile."""
        request = json.loads((Path(folder) / "asked.json").read_text(encoding="utf-8"))
        prepared = self.prepared(request["model"], {**request["settings"], **(settings or {})}, request["rows"])
        return self._train_until(prepared, RunFolder.unfinished(Path(folder)), stop_after)

    def evaluate(self, model: str, settings: Given, rows: Sequence[Given], adapter: str | None = None) -> Answer:
        """The held-out loss of these rows."""
        file = self.rows_file(rows)
        prepared = self.prepared(model, {**settings, "data.valid": str(file)}, [{"prompt": "~", "completion": "~~"}])
        session = self.answering_session(model, settings, adapter)
        value, count = mean_loss(session, held_out_batches(prepared))
        return {"loss": value, "count": count}

    def initial_adapter(self, model: str, settings: Given) -> Answer:
        """The adapter that training begins with."""
        prepared = self.prepared(model, settings, [{"prompt": "a", "completion": "b"}])
        folder = self.new_folder()
        self.fresh_session(prepared).save_adapter(folder)
        return self.adapter_weights(model, str(folder))

    def adapter_weights(self, model: str, adapter: str) -> Answer:
        """What is in an adapter's folder, which is PEFT's own format."""
        target = replace(read_settings(Path(adapter), transposed=True), rank_pattern={}, alpha_pattern={})
        return {"file": str(Path(adapter) / WEIGHTS), "scale": target.scale_of("any layer")}

    def logits(self, model: str, settings: Given, prompts: Prompts, adapter: str | None = None) -> Answer:
        """Logits of the base, or with an adapter that was saved."""
        file = self.new_folder() / "logits.safetensors"
        self.answering_session(model, settings, adapter).save_logits(prompts, file)
        return {"file": str(file)}

    def generate(self, model: str, settings: Given, prompts: Prompts, adapter: str | None = None) -> Answer:
        """Greedy answers, ended by what ends an answer."""
        config = self.loaded(model, settings).config
        stops = Encoder(locate_model(model), config.template.name).stop_ids
        session = self.answering_session(model, settings, adapter)
        return {"answers": session.generate(prompts, config.evaluation.max_new_tokens, stops)}

    def go_on(self, model: str, adapter: str, settings: Given, rows: Sequence[Given], folder: str) -> Answer:
        """A run that trains an adapter on, as it is found in a folder of its own, with nothing of its run around it."""
        alone = self.new_folder() / "adapter"
        shutil.copytree(adapter, alone)
        return self.train(model, {**settings, "model.adapter": str(alone)}, rows, folder)

    def train_pairs(
        self,
        model: str,
        settings: Given,
        rows: Sequence[Given],
        folder: str,
        adapter: str | None = None,
        start: str | None = None,
    ) -> Answer:
        """A run on pairs, from a fresh adapter, from a finished one, or from weights."""
        given = {**settings, "training.objective": "dpo", "judge.answers": "auto"}
        if start is not None:
            found: Answer = self.handlers["train_from"](model, given, rows, start)
            return found
        if adapter is not None:
            return self.go_on(model, adapter, given, rows, folder)
        return self.train(model, given, rows, folder)

    def lengthen(self, folder: str, epochs: float) -> Answer:
        """Go on with a run that had come to its end, until it has trained for so many epochs."""
        request = json.loads((Path(folder) / "asked.json").read_text(encoding="utf-8"))
        planned = self.prepared(request["model"], request["settings"], request["rows"])
        place = RunFolder.unfinished(Path(folder), longer=True)
        return self._train_until(lengthen(planned, Longer(epochs)), place, None, planned)

    def measure_file(self, model: str, settings: Given, rows: Sequence[Given], valid: Sequence[Given]) -> Answer:
        """A run that holds rows out, and what `ft evaluate RUN --data` says of the file of them when it is done."""
        held = str(self.rows_file(valid))
        given, run = {**settings, "data.valid": held}, RunFolder(self.new_folder() / "run")
        self.train(model, given, rows, str(run.path))
        prepared = self.prepared(model, given, rows)
        files = {"model": {"files": base_files(prepared.location)}, "data": {"files": data_files(prepared)}}
        judged = {"format": FORMAT, "losses": {}, "versions": {}, "plan": [], "verdicts": [], "notes": []}
        run.write_manifest({**judged, **files, "artifacts": run.describe()})
        losses = [event.loss for event in run.read_events() if isinstance(event, HeldOutLoss)]
        [found] = [each for each in evaluate_on_file(run.path, held)["measures"] if each["id"] == "loss"]
        return {
            "run": {"base": losses[0], "tuned": losses[-1]},
            "file": {"base": found["base"], "tuned": found["tuned"]},
            "count": found["tokens"],
        }

    def _train_until(
        self, prepared: Prepared, place: RunFolder, stop_after: int | None, planned: Prepared | None = None
    ) -> Answer:
        steps: list[dict[str, Any]] = []

        def listen(event: Event) -> None:
            if isinstance(event, StepDone):
                steps.append({"step": event.step, "loss": event.loss, "learning_rate": event.learning_rate})
            if isinstance(event, CheckpointSaved) and event.step == stop_after:
                raise _StoppedAtCheckpointError

        run = replace(self.run(prepared, place.path, listen), planned=planned)
        owner = run_owner(prepared, self.backend.versions())
        adapter = None
        try:
            claim_resumed(run, owner)
            if run.lengthened is not None:
                run.tell(run.lengthened)
                place.tidy()
            session = self.fresh_session(prepared)
            run.settle_objective(session)
            train_to_the_end(run, session, observe(session, prepared), owner)
            write_folder(place.adapter, lambda folder: save_trained(prepared, session, folder))
            adapter = str(place.adapter)
        except _StoppedAtCheckpointError:
            pass
        finally:
            run.let_go()
        store = CheckpointStore(place.checkpoints)
        kept = {str(step): str(store.folder / f"step-{step:08d}") for step in store.steps()}
        return {"steps": steps, "adapter": adapter, "checkpoints": kept}


class _StoppedAtCheckpointError(Exception):
    """Training ends here."""


def inside(backend: str, scratch: Path) -> InProcessSubject:
    """Our trainer in this process."""
    trainer = OurTrainer(backend, scratch)
    about = About(f"finetune with {backend}", trainer.backend.versions(), dict.fromkeys(trainer.handlers, ""))
    return InProcessSubject(about, trainer.handlers, [FineTuneError], trainer.program.close)


def _rows(batch: Sequence[Given]) -> tuple[TokenizedRow, ...]:
    return tuple(TokenizedRow(tuple(row["ids"]), tuple(row["targets"]), str(n)) for n, row in enumerate(batch))


def _own_places(row: TokenizedRow, prepared: Sequence[TokenizedRow]) -> list[bool]:
    """Which tokens of a row in a batch were prepared, and which it was filled up with."""
    sizes = (len(each.ids) for each in prepared if row.ids[: len(each.ids)] == each.ids)
    size = max(sizes, default=len(row.ids))
    return [place < size for place in range(len(row.ids))]


def _micro(batch: Batch, prepared: Mapping[str, Sequence[TokenizedRow]]) -> Answer:
    """A batch as the training loop gets it, with what of it was prepared."""
    sequences = batch.sequences
    return {
        "ids": [[token for row in sequence for token in row.ids] for sequence in sequences],
        # The first token of a row is never predicted: nothing precedes it.
        "targets": [
            [mark and place > 0 for row in sequence for place, mark in enumerate(row.trained)] for sequence in sequences
        ],
        "real": [
            [own for row in sequence for own in _own_places(row, prepared.get(row.where, ()))] for sequence in sequences
        ],
        "positions": [[place for row in sequence for place in range(len(row.ids))] for sequence in sequences],
        "segments": [[number for number, row in enumerate(sequence) for _ in row.ids] for sequence in sequences],
    }


def main() -> None:
    """Answer questions: the backend is the first argument."""
    backend = sys.argv[1]
    trainer = OurTrainer(backend, Path.cwd())
    versions = trainer.backend.versions()
    try:
        serve(f"finetune with {backend}", versions, trainer.handlers, refusals=(FineTuneError,))
    finally:
        trainer.program.close()


if __name__ == "__main__":
    main()
