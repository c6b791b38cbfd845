"""Fine-tuning from Python in one call: `finetune.train(model=..., data=..., epochs=...)`."""

import contextlib
import html
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from finetune.config import KEYS, load_config
from finetune.errors import UsageError
from finetune.records import Outcome, Verdict
from finetune.report import render_html
from finetune.report.progress import Progress
from finetune.run.folder import RunFolder
from finetune.train import fine_tune
from finetune.training.run import Listener

_SHORT = {"lr": "training.learning_rate", "model": "model.path", "data": "data.train", "template": "template.name"}


@dataclass(frozen=True, slots=True)
class FineTuned:
    """A finished run: its folder, the verdict on it, and all that `run.json` holds, as `record`."""

    folder: Path
    outcome: Outcome
    verdicts: tuple[Verdict, ...]
    advice: tuple[str, ...]
    record: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether everything that counts passed."""
        return self.outcome == Outcome.PASSED

    @property
    def report(self) -> Path:
        """The page about the run."""
        return RunFolder(self.folder).report_page

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, in PEFT's format; of the model, where all of it was trained."""
        run = RunFolder(self.folder)
        return run.adapter if run.adapter.is_dir() else run.model

    def _repr_html_(self) -> str:
        """The report, for a notebook: in a frame, so that its style and the notebook's keep apart."""
        page = html.escape(render_html([{**self.record, "folder": str(self.folder)}]))
        style = "width: 100%; height: 48em; border: 0"
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="{style}"></iframe>'


def train(
    config: str | PathLike[str] | None = None,
    *,
    model: str | PathLike[str] | None = None,
    data: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
    progress: bool = True,
    **settings: object,
) -> FineTuned:
    """Fine-tune a model, judge the result on measured evidence, and write the run's folder.

    Without arguments: the shipped model on the shipped data.

    Args:
        config: a YAML file, as `ft init` writes one.
        model: a shipped name, a folder, a GGUF file or a hub id.
        data: the training rows.
        output: the run's folder; by default one below `runs/`.
        progress: show on standard error what is going on.
        settings: any setting by its name, such as `epochs=3`, `lr=2e-4`, `rank=16`; where the name is one of several
            sections, or to be clear, with its section: `training__seed=1`. `profile="chat"` is a named starting point.

    Raises:
        FineTuneError: something was refused, failed, or was interrupted; see `finetune.errors`.
    """
    given = {"model": model, "data": data}
    overrides: dict[str, object] = {_SHORT[name]: fspath(value) for name, value in given.items() if value is not None}
    named = settings.pop("profile", None)
    profile = None if named is None else str(named)
    overrides |= {_key(name): value for name, value in settings.items()}
    file = None if config is None else Path(config)
    loaded = load_config(file, overrides=overrides, profile=profile)
    if loaded.config.data.train is None and "profile" not in loaded.origins.values():
        loaded = load_config(file, overrides=overrides, profile="demo")
    with Progress() if progress else contextlib.nullcontext() as shown:
        listener: Listener = shown or (lambda event: None)
        place = None if output is None else Path(output)
        folder, record = fine_tune(loaded, output=place, command="finetune.train(...)", listener=listener)
    verdicts = tuple(Verdict(**each) for each in record.get("verdicts", ()))
    return FineTuned(
        folder,
        Outcome(record.get("outcome", Outcome.NOT_APPLICABLE)),
        verdicts,
        tuple(record.get("advice", ())),
        record,
    )


def _key(name: str) -> str:
    """The dotted key of a setting that was named without its section, or with it as `section__name`."""
    if "__" in name or name in KEYS:
        return name.replace("__", ".")
    homes = [key for key in KEYS if key.partition(".")[2] == name]
    if len(homes) > 1:
        known = " or ".join(key.replace(".", "__") for key in homes)
        raise UsageError(f"{name!r} is a setting of several sections", hint=f"write {known}")
    return homes[0] if homes else _SHORT.get(name, name)
