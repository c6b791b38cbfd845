"""A subject to a trainer that is a command: called anew for each question, and ended with all that it started."""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from finetune.processes import end_marked, tie
from finetune.verify.subjects.answers import ANSWERS
from finetune.verify.subjects.command_file import Called, CommandFile, filled, named
from finetune.verify.subjects.subject import About, RefusesError, SubjectError, UnsupportedError

_MARK = "FT_SUBJECT"
_LAST_WORDS = 1_500
Given = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Done:
    """A command that has ended well: what it printed, and where it wrote."""

    printed: str
    output: Path


class CommandSubject:
    """The subject to a command.

    Args:
        file: what is called.
        folder: where it lives; what it writes goes below, or where it is told to.
        python: what `{python}` stands for.
    """

    def __init__(self, file: CommandFile, folder: Path, *, python: str = sys.executable) -> None:
        self._file = file
        self._folder = folder
        self._python = python
        self.left_running: list[str] = []
        """What ran on after a command had ended, by its command."""
        abilities = dict.fromkeys((*file.commands, "adapter_weights"), "")
        why = "a command shows what it writes, and nothing of this"
        missing = {name: why for name in ANSWERS if name not in abilities}
        self.about = About(file.name, self._versions(), {**abilities, **missing})

    def ask(self, ability: str, arguments: Given) -> Given:
        """The answer to one question.

        Raises:
            RefusesError, UnsupportedError, SubjectError: as `Subject.ask`.
        """
        handlers: Mapping[str, Callable[..., Given]] = {
            "train": self._train,
            "resume": self._resume,
            "evaluate": self._evaluate,
            "merge": self._merge,
            "generate": self._generate,
            "adapter_weights": self._adapter_weights,
        }
        if self.about.abilities.get(ability, "no such ability"):
            raise UnsupportedError(f"there is no {ability}")
        try:
            return handlers[ability](**arguments)
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise SubjectError(f"asked to {ability} it left what cannot be read: {error!r}") from error

    def close(self) -> None:
        """Every command has ended with its question."""

    def _train(
        self, model: str, settings: Given, rows: Sequence[Given], folder: str, stop_after: int | None = None
    ) -> Given:
        """A run; one that is stopped is what a whole run had left when the checkpoint of that step was there."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        if stop_after is None:
            return self._course(self._call("train", model, settings, rows=rows, output=place / "output"), place)
        if self._file.resume is None:
            raise UnsupportedError("no command goes on with a run that was stopped")
        done = self._call("train", model, settings, rows=rows, output=self._new() / "output")
        request = {"model": model, "settings": dict(settings), "rows": list(rows)}
        (place / "asked.json").write_text(json.dumps(request), encoding="utf-8")
        for step, path in self._checkpoints(done.output).items():
            if step <= stop_after:
                _copy(path, place / "output" / path.relative_to(done.output))
        steps = [step for step in self._steps(done) if step["step"] <= stop_after]
        kept = {str(step): str(path) for step, path in self._checkpoints(place / "output").items()}
        return {"steps": steps, "adapter": None, "checkpoints": kept, "told": done.printed}

    def _resume(self, folder: str, stop_after: int | None = None, settings: Given | None = None) -> Given:
        place = Path(folder)
        request = json.loads((place / "asked.json").read_text(encoding="utf-8"))
        kept = self._checkpoints(place / "output")
        if stop_after is not None or not kept:
            raise UnsupportedError("a run goes on to its end, from a checkpoint")
        newest = max(kept)
        whole = {**request["settings"], **(settings or {})}
        more = {"checkpoint": str(kept[newest])}
        if "training.max_steps" in self._in_force(whole):
            more["remaining"] = str(self._in_force(whole)["training.max_steps"] - newest)
        done = self._call("resume", request["model"], whole, rows=request["rows"], output=place / "output", more=more)
        return self._course(done, place)

    def _evaluate(self, model: str, settings: Given, rows: Sequence[Given], adapter: str | None = None) -> Given:
        done = self._call("evaluate", model, settings, rows=rows, more={"adapter": adapter or ""})
        return {"loss": float(self._answer("evaluate", done))}

    def _merge(self, model: str, settings: Given, adapter: str) -> Given:
        return {"folder": str(self._call("merge", model, settings, more={"adapter": adapter}).output)}

    def _generate(
        self, model: str, settings: Given, prompts: Sequence[Sequence[int]], adapter: str | None = None
    ) -> Given:
        tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        answers = []
        for ids in prompts:
            prompt = tokenizer.decode(list(ids), skip_special_tokens=False)
            done = self._call("generate", model, settings, more={"adapter": adapter or "", "prompt": prompt})
            answers.append(tokenizer.encode(self._answer("generate", done), add_special_tokens=False).ids)
        return {"answers": answers}

    def _adapter_weights(self, model: str, adapter: str) -> Given:
        folder = Path(adapter)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if self._file.format == "peft":
            by = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
            return {"file": str(folder / "adapter_model.safetensors"), "scale": config["lora_alpha"] / by}
        file = self._new() / "adapter.safetensors"
        names = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}
        found = {
            f"base_model.model.{name[:-7]}{names[name[-7:]]}": np.ascontiguousarray(tensor.T.astype(np.float32))
            for name, tensor in load_file(folder / "adapters.safetensors").items()
        }
        save_file(found, file)
        return {"file": str(file), "scale": config["lora_parameters"]["scale"]}

    def _course(self, done: _Done, place: Path) -> Given:
        adapter = done.output / self._file.adapter
        if not (adapter / "adapter_config.json").is_file():
            raise SubjectError(
                f"there is no adapter in {adapter} after training; its last words: {_last(done.printed)}"
            )
        kept = {str(step): str(path) for step, path in self._checkpoints(place / "output").items()}
        return {"steps": self._steps(done), "adapter": str(adapter), "checkpoints": kept, "told": done.printed}

    def _steps(self, done: _Done) -> list[dict[str, Any]]:
        pattern = self._file.told
        if pattern is None:
            return []
        text = done.printed if pattern.file is None else (done.output / pattern.file).read_text(encoding="utf-8")
        steps: list[dict[str, Any]] = []
        for match in filter(None, map(re.compile(pattern.line).search, text.splitlines())):
            groups = match.groupdict()
            rate = groups.get("learning_rate")
            step = int(groups.get("step") or len(steps) + 1)
            steps.append({"step": step, "loss": float(groups["loss"]), "learning_rate": rate and float(rate)})
        return steps

    def _checkpoints(self, output: Path) -> dict[int, Path]:
        pattern, found = re.compile(self._file.checkpoints or "(?!)"), {}
        for path in sorted(output.rglob("*")):
            if match := pattern.fullmatch(path.relative_to(output).as_posix()):
                found[int(match["step"])] = path
        return found

    def _answer(self, ability: str, done: _Done) -> str:
        pattern = self._file.commands[ability].answer or "(?s)(.*)"
        match = re.search(pattern, done.printed)
        if match is None:
            raise SubjectError(f"asked to {ability} it printed no {pattern!r}, but: {_last(done.printed)}")
        return match[1]

    def _in_force(self, settings: Given) -> dict[str, Any]:
        return {**self._file.settings, **settings}

    def _call(
        self,
        ability: str,
        model: str,
        settings: Given,
        *,
        rows: Sequence[Given] = (),
        output: Path | None = None,
        more: Given | None = None,
    ) -> _Done:
        """Call a command, with everything in its place."""
        called, work = self._file.commands[ability], self._new()
        texts = [*called.argv, *called.files.values()]
        self._require_places(settings, {name for text in texts for name in named(text)})
        (work / called.data).write_text(
            "".join(json.dumps(_shaped(row, called)) + "\n" for row in rows), encoding="utf-8"
        )
        force, place = self._in_force(settings), output or work / "output"
        values = {"model": model, "data": str(work), "output": str(place), "python": self._python, **(more or {})}
        values |= {f"settings.{key}": _written(value) for key, value in force.items()}
        values |= {f"files.{name}": str(work / name) for name in called.files}
        if "adapter.alpha" in force and "adapter.rank" in force:
            values["scale"] = _written(force["adapter.alpha"] / force["adapter.rank"])
        absent = sorted({name for text in texts for name in named(text)} - set(values))
        if absent:
            raise UnsupportedError(f"{ability} needs {', '.join(absent)}, which neither the law nor the file gives")
        for name, text in called.files.items():
            (work / name).write_text(filled(text, values), encoding="utf-8")
        printed = self._run([filled(word, values) for word in called.argv], work, called)
        return _Done(printed, place)

    def _require_places(self, settings: Given, names: set[str]) -> None:
        """See that each setting has a place in the command, or is what the file says that it is.

        Raises:
            UnsupportedError: one has not.
        """
        used = {name.removeprefix("settings.") for name in names}
        used |= {"adapter.rank", "adapter.alpha"} if "scale" in names else set()
        for key, value in settings.items():
            if key not in used and not (key in self._file.settings and self._file.settings[key] == value):
                raise UnsupportedError(f"{key}: {value!r}: the command has no place for it")

    def _run(self, argv: Sequence[str], work: Path, called: Called) -> str:
        """What a command prints; it is given its time, and nothing of it is left.

        Raises:
            RefusesError, SubjectError: as `Subject.ask`.
        """
        mark, log = secrets.token_hex(8), work / "printed.txt"
        home = self._folder / "home"
        home.mkdir(exist_ok=True)
        own = {"HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home), "COLUMNS": "200", _MARK: mark}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            with log.open("wb") as out:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=work,
                    env={**environment, **own, **self._file.environment, **tie()},
                    start_new_session=True,
                )
        except OSError as error:
            raise SubjectError(f"{argv[0]} cannot be started: {error.strerror}") from None
        try:
            process.wait(called.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise SubjectError(f"{argv[0]} did not end within {called.seconds:.0f} s, and was ended") from None
        finally:
            left = end_marked(_MARK, mark)
            self.left_running += left if process.returncode != -9 else []
        printed = log.read_text(encoding="utf-8", errors="replace")
        if process.returncode in self._file.refuses:
            lines = printed.strip().splitlines()
            raise RefusesError(lines[-1] if lines else f"it ended with code {process.returncode}")
        if process.returncode:
            words = _last(printed) or "none"
            raise SubjectError(f"{argv[0]} ended with code {process.returncode}; its last words: {words}")
        return printed

    def _versions(self) -> dict[str, str]:
        if self._file.version is None:
            return {"the file": self._file.name}
        argv = [filled(word, {"python": self._python}) for word in self._file.version]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(argv, cwd=self._folder, capture_output=True, text=True, timeout=120, check=True)
            return {self._file.name: done.stdout.strip()[:80]}
        raise SubjectError(f"{' '.join(argv)} does not tell a version")

    def _new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder))


def _written(value: object) -> str:
    """A value as command lines take it: a whole number without a point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _shaped(row: Given, called: Called) -> Given:
    """A row in the shape that a command reads."""
    if called.rows == "pairs" or set(row) != {"prompt", "completion"}:
        return row
    question, answer = (
        {"role": role, "content": row[key]} for role, key in (("user", "prompt"), ("assistant", "completion"))
    )
    return (
        {"messages": [question, answer]}
        if called.rows == "messages"
        else {"prompt": [question], "completion": [answer]}
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def _last(printed: str) -> str:
    return printed.strip()[-_LAST_WORDS:]
