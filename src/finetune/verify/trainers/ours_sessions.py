"""What our trainer makes of a question's settings: a plan, prepared rows, a run, a session."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.chat.encoder import Encoder
from finetune.config import LoadedConfig, load_config, resolve_processes
from finetune.events import Event
from finetune.evidence.starting import with_start
from finetune.files import write_text
from finetune.models.locate import locate_model
from finetune.ports import Session
from finetune.run.folder import RunFolder
from finetune.training.prepare import Prepared, prepare
from finetune.training.run import Run
from finetune.training.start import start_of

Given = Mapping[str, Any]
Answer = dict[str, Any]
Prompts = Sequence[Sequence[int]]
Handler = Callable[..., Answer]
_QUIET = {
    "judge.answers": "exact",
    "judge.control": "never",
    "judge.memory": "never",
    "data.valid_fraction": 0.0,
    "evaluation.questions": 0,
}
"""What a run does beside training, which laws ask for by itself."""


class OurSessions:
    """Plans, runs and sessions with one backend; what is made goes into a scratch folder."""

    def __init__(self, backend: str, scratch: Path) -> None:
        self.backend = open_backend(backend)
        self.scratch = scratch

    def new_folder(self) -> Path:
        """An empty folder of its own for each answer."""
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def rows_file(self, rows: Sequence[Given]) -> Path:
        """A file of these rows; the same rows lie in the same file, for a run knows its data by its name, too."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = self.scratch / f"rows-{sha256(text.encode()).hexdigest()[:32]}.jsonl"
        if not path.exists():
            write_text(path, text)
        return path

    def loaded(self, model: str, settings: Given) -> LoadedConfig:
        """The configuration that `ft` would load."""
        given = {**_QUIET, "backend": self.backend.name, **settings, "model.path": model}
        return load_config(None, environ={}, overrides=given, profile=None)

    def prepared(self, model: str, settings: Given, rows: Sequence[Given]) -> Prepared:
        """The plan, and these rows as they are trained on."""
        return self.prepared_of(model, {**settings, "data.train": str(self.rows_file(rows))})

    def prepared_of(self, model: str, settings: Given) -> Prepared:
        """The plan, and the rows that the settings name."""
        return prepare(resolve_processes(with_start(self.loaded(model, settings)), 1, resume=False))

    def run(self, prepared: Prepared, folder: Path, listener: Callable[[Event], None] = lambda event: None) -> Run:
        """A run of what was prepared, in a folder."""
        start = start_of(prepared.plan.config)
        return Run(prepared, self.backend, self.backend.join(), RunFolder(folder), listener, start=start)

    def fresh_session(self, prepared: Prepared) -> Session:
        """A session with the adapter that training begins with."""
        dtype, pad_id = prepared.plan.config.model.dtype, prepared.encoder.tokenizer.pad_id
        session = self.backend.open(prepared.location, dtype, pad_id, device="cpu")
        self.run(prepared, self.scratch).attach_adapter(session)
        return session

    def answering_session(self, model: str, settings: Given, adapter: str | None) -> Session:
        """A session that only answers."""
        config = self.loaded(model, settings).config
        location = locate_model(model)
        pad = Encoder(location, config.template.name).tokenizer.pad_id
        session = self.backend.open(location, config.model.dtype, pad, device="cpu")
        if adapter is not None:
            session.load_adapter(Path(adapter))
        return session
