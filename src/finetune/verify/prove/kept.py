"""Keeps the runs of a campaign that are done, so that one that was stopped goes on."""

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import finetune
import finetune_strategies
from finetune.verify.prove.job import FaultRun, Job

FILE = "runs.jsonl"


class KeptRuns:
    """The runs of a file, a line each: of the very code that is here now, and none that ended in an error.

    Attributes:
        dropped: how many runs of the file are of other code, or are damaged.
    """

    def __init__(self, file: Path) -> None:
        self.dropped = 0
        self._file = file
        self._code = _mark_of_code()
        self._runs: dict[str, FaultRun] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            if not line:
                continue
            try:
                found = json.loads(line)
                if found["code"] == self._code:
                    self._runs[found["job"]] = FaultRun(**found["run"])
                else:
                    self.dropped += 1
            except (ValueError, KeyError, TypeError):  # the last line, where the machine went down
                self.dropped += 1

    def __len__(self) -> int:
        return len(self._runs)

    def of(self, job: Job) -> FaultRun | None:
        """The run of a job, where it was done."""
        return self._runs.get(_key(job))

    def keep(self, jobs: Iterable[Job], runs: Iterable[FaultRun]) -> Iterator[FaultRun]:
        """The runs of these jobs, in their order, each written down before it is handed on."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for job, run in zip(jobs, runs, strict=True):
            if not run.error:
                line = json.dumps({"code": self._code, "job": _key(job), "run": asdict(run)})
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(f"\n{line}")  # a line that was cut off before stays alone
            yield run


def _key(job: Job) -> str:
    return json.dumps(asdict(job), sort_keys=True)


def _mark_of_code() -> str:
    """A mark of the product, the strategies and what draws with them: runs of other code are other runs."""
    whole = hashlib.sha256(f"{platform.python_version()} {version('hypothesis')}".encode())
    for package in (finetune, finetune_strategies):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            whole.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]
