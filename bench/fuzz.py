"""Damages what commands read, in ways that a seed decides, and counts what ends badly: `make fuzz`.

A case is a command, and a file that it reads (or an argument, or a variable of the environment) that is cut off,
nested, huge, of the wrong type, no file, or holds what nobody meant. It ends well where `ft` gives an exit code of its
own within bounds of time and memory, without a traceback, nothing outside its folder is touched or executed, and no
file and no line holds a secret of the environment. Each failure is told with the number that `--only` makes again.
"""

import argparse
import contextlib
import faulthandler
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from fuzz_cases import COMMANDS, READ, SOUND, SUBJECT, TEMPLATE, TRAINED, Case, make_case

PROCESSOR_SECONDS = 30
SECONDS = 180
MOST_BYTES = 2 * 10**9
CODES = (0, 1, 2, 3, 4, 130)
CANARY = "canary-4c1e77d09b"
LOGIN = f"http://me:{CANARY}@127.0.0.1:1"
SECRETS = {
    **dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"), CANARY),
    **dict.fromkeys(("OLLAMA_HOST", "HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "WANDB_BASE_URL"), LOGIN),
    "MLFLOW_TRACKING_URI": f"{LOGIN}/?token={CANARY}",
}
"""What a user's environment may hold, and nothing may tell."""


def ft(*words: str, folder: Path) -> None:
    """Run a command that must succeed or judge."""
    command = [sys.executable, "-c", "from finetune.cli import main; main()", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 4):
        raise SystemExit(f"{words}: {done.stderr}")


def on_backend(words: Sequence[str], backend: str) -> tuple[str, ...]:
    """A command as it is typed for another backend."""
    own = {"reference": backend, "backend=reference": f"backend={backend}"}
    pairs = zip(("", *words), words, strict=False)
    return tuple(own.get(word, word) if before in ("--backend", "--set") else word for before, word in pairs)


def make_place(folder: Path, backend: str) -> None:
    """A folder with one sound file of each kind that is read."""
    from finetune.backends import open_backend
    from finetune.models.locate import locate_model

    folder.mkdir(parents=True)
    shipped = locate_model("reference-llama").folder
    config = json.loads((shipped / "config.json").read_text())
    config |= {"hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 4}
    (folder / "model").mkdir()
    for file in shipped.glob("*"):
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / "model")
    open_backend("reference").create(config, folder / "model", seed=0)
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "other.jsonl").write_text(lines.replace("What", "Which").replace("It", "This"))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "table.csv").write_text("prompt,completion\n" + "".join(f"p {n},c {n}\n" for n in range(4)))
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "subject.toml").write_text(SUBJECT)
    (folder / "tools.json").write_text('[{"type": "function", "function": {"name": "f", "parameters": {}}}]')
    (folder / "messages.json").write_text('[{"role": "user", "content": "hello"}]')
    (folder / "outside").mkdir()
    (folder / "outside" / "mine").write_text("mine")
    _make_table(folder / "table.parquet", rows)
    ft(*on_backend(COMMANDS["train"][:-1], backend), "run", folder=folder)
    ft(*on_backend(("train", *TRAINED), backend), "--output", "half", folder=folder)
    for name in ("run.json", "report.html"):
        (folder / "half" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "half/checkpoints/step-00000002")
    # Random weights are refused as being far from what they say; the file is whole all the same.
    ft("export", "run", "--outtype", "f32", "--output", "model.gguf", folder=folder)
    (folder / "model.refused.gguf").rename(folder / "model.gguf")
    shutil.copy(folder / "run" / "plan.yaml", folder / "finetune.yaml")
    _make_findings(folder)


def _make_table(path: Path, rows: list[dict[str, str]]) -> None:
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _make_findings(folder: Path) -> None:
    """A finding, a baseline, and a history."""
    from finetune.report.history import HistoryEntry, append_entry
    from finetune.verify.catalogue import catalogue
    from finetune.verify.findings import Finding, write_finding
    from finetune.verify.run import FORMAT, VERSION

    law = catalogue()["safety.code"]
    assert law.kind is not None
    write_finding(Finding(law, law.kind(name="AutoConfig"), "reference", "a", "b"), folder / "finding.json")
    judged = [{"law": "config.rows", "outcome": "failed", "why": "", "case": {"a": 1}}]
    known = {"format": FORMAT, "version": VERSION, "subject": "reference", "laws": judged}
    (folder / "known.json").write_text(json.dumps(known))
    for passed in (3, 5):
        counts = {"passed": passed, "failed": 0, "skipped": 1, "errors": 0, "cases": 9, "largest_process_bytes": 10**8}
        said = {"commit": "abc", "python": "3.12", "platform": "Linux", "profile": "fast", "seconds": 3.0}
        began = datetime(2026, 1, passed, tzinfo=UTC)
        append_entry(folder / "history.jsonl", HistoryEntry(when=began, tier=1, **said, **counts, scores={"a": 1.0}))


@dataclass(frozen=True)
class Ending:
    """How a command ended: its code, below zero that of a signal, its words, and what it took."""

    code: int
    said: str
    seconds: float
    peak: int

    def wrong(self) -> str:
        """What was wrong with it; nothing where it ended well."""
        if -self.code in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM):
            return "hang"
        if "Traceback" in self.said or "panicked" in self.said:
            return "traceback"
        if self.peak > MOST_BYTES:
            return f"{self.peak / 1e9:.1f} GB"
        return "" if self.code in CODES else f"code {self.code}"


def run(case: Case, place: Path) -> Ending:
    """Run a command in a process that is forked from this one, which has imported what it needs."""
    said = place.parent / f"{place.name}.said"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _be(case, place, said)
    _, status, used = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Ending(code, said.read_text(errors="replace"), time.monotonic() - began, peak)


def _be(case: Case, place: Path, said: Path) -> None:
    """Be the command; never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        for number, end in enumerate(
            (os.open(os.devnull, os.O_RDONLY), os.open(said, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        ):
            os.dup2(end, number)
        os.dup2(1, 2)
        os.chdir(place)
        os.environ.update(case.environment)
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 5))
        signal.alarm(SECONDS)
        for number in (signal.SIGXCPU, signal.SIGALRM):
            faulthandler.register(number, chain=True)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_DATA, (2 * MOST_BYTES, 2 * MOST_BYTES))
        sys.argv = ["ft", *case.words]
        from finetune.cli import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def sound_case(number: int) -> Case:
    """One of the commands as it is."""
    name = tuple(SOUND)[number]
    return Case(tuple(word.replace("{secret}", CANARY) for word in SOUND[name]), {}, name)


def fuzz(
    numbers: list[int], seed: int | None, folder: Path, *, backend: str = "reference", read: Sequence[str] = ()
) -> Iterator[tuple[int, Case, Ending, str]]:
    """Try these cases, each in a place that is sound but for what the case damages; without a seed, nothing is."""
    import finetune.cli.app  # noqa: F401  # what every command needs is imported once

    import_module(f"finetune.backends.{backend}.backend")

    place, sound = folder / "place", folder / "sound"
    os.environ |= SECRETS
    os.environ |= {"HOME": str(folder / f"home-{CANARY}"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    make_place(place, backend)
    shutil.copytree(place, sound)
    outside, around = _seen(place / "outside"), {"place", "sound", f"home-{CANARY}", "place.said"}
    for number in numbers:
        shutil.rmtree(place)
        shutil.copytree(sound, place)
        case = sound_case(number) if seed is None else make_case(seed, number, place, read)
        case = replace(case, words=on_backend(case.words, backend))
        ending = run(case, place)
        wrong = ending.wrong()
        if _seen(place / "outside") != outside or {each.name for each in folder.iterdir()} - around:
            wrong = "what lies outside was touched"
        elif CANARY in ending.said or any(_tells(each) for each in place.rglob("*")):
            wrong = "a secret was told"
        yield number, case, ending, wrong


def _seen(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def _tells(file: Path) -> bool:
    """Whether a file holds the secret; what is far larger than any that is written was put there by the case."""
    return file.is_file() and file.stat().st_size < 10**8 and CANARY.encode() in file.read_bytes()


def main() -> int:
    """Try so many cases and tell of each that ends badly; 1 where one did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--only", type=int, action="append", help="this case alone, with all that it says")
    parser.add_argument("--sound", action="store_true", help="each command once, and nothing is damaged")
    parser.add_argument("--backend", default="reference", help="what trains and reads")
    parser.add_argument("--read", choices=READ, action="append", default=[], help="damage these files alone")
    parser.add_argument("--first", type=int, default=0, help="the number to begin with")
    given = parser.parse_args()
    seed, count = (None, len(SOUND)) if given.sound else (given.seed, given.count)
    numbers = given.only or list(range(given.first, given.first + count))
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, case, ending, wrong in fuzz(numbers, seed, Path(folder), backend=given.backend, read=given.read):
            ends[wrong or f"code {ending.code}"] += 1
            if sys.stderr.isatty() or sum(ends.values()) % 50 == 0:
                print(f"{sum(ends.values())} of {len(numbers)}", file=sys.stderr, flush=True)
            told = f"{number}: ft {' '.join(case.words)[:100]!a} ({case.told!a}): {wrong or ending.code}"
            if wrong or given.only:
                print(
                    told,
                    f"{ending.seconds:.1f} s",
                    ending.said if given.only else ending.said[-600:],
                    sep="\n",
                    flush=True,
                )
    print(json.dumps({"seed": seed, "backend": given.backend, "cases": len(numbers), "ends": ends}))
    return int(not all(end.startswith("code ") and int(end[5:]) in CODES for end in ends))


if __name__ == "__main__":
    sys.exit(main())
