"""Opens finished runs again, to score them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.chat.encoder import Encoder
from finetune.config import TrainingConfig, load_plan
from finetune.errors import TemplateError
from finetune.evidence.observe import Observation, observe
from finetune.evidence.saved import open_model, open_tuned, prepare_again, saved_in
from finetune.ports import Session
from finetune.reading import read_text
from finetune.records import ModelLocation
from finetune.run.folder import RunFolder
from finetune.training.prepare import Prepared


def reopen(path: Path) -> tuple[Prepared, Session]:
    """A finished run as it ended: its data prepared again, its base model loaded, its adapter on it.

    Raises:
        FineTuneError: the run is not finished, or its model, data or adapter cannot be used any more.
    """
    folder = RunFolder.finished(path)
    plan, prepared = load_plan(folder.plan), prepare_again(folder)
    template = saved_in(folder, plan.config) / "chat_template.jinja"
    try:
        same = read_text(template) == prepared.encoder.source.jinja
    except (OSError, ValueError):
        same = False
    if not same:
        raise TemplateError(f"the template that {path} was trained with has changed since", hint="restore the file")
    return prepared, _open(folder, plan.config, prepared.location, prepared.encoder)


def compare(prepared: Prepared, session: Session) -> tuple[Observation, Observation]:
    """A look at the base and a look at the tuned model that `reopen` gave.

    Raises:
        FineTuneError: the base cannot be loaded again.
    """
    with base_of_run(prepared, session) as model:
        base = observe(model, prepared)
    return base, observe(session, prepared, base)


@contextmanager
def base_of_run(prepared: Prepared, session: Session) -> Iterator[Session]:
    """The base of the tuned model that `reopen` gave: for a moment itself, its adapter off, or another session."""
    if prepared.target is not None:
        with session.adapter_disabled():
            yield session
    else:
        # Only what is not quantised can be trained whole, so this base is not.
        yield open_model(prepared.plan.config, prepared.location, prepared.encoder)


def _open(folder: RunFolder, config: TrainingConfig, location: ModelLocation, encoder: Encoder) -> Session:
    return open_tuned(folder, config, location, lambda place: open_model(config, place, encoder))
