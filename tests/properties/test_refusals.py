"""Every bad input is refused with the exit code of its kind, names what it is about, and says how to mend it."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.chat.tokenizer import FileTokenizer
from finetune.config import ModelAndDataFacts, load_config, load_plan, parse_assignments, resolve, resolve_processes
from finetune.data.facts import new_facts
from finetune.data.read import read_rows
from finetune.data.shape import shape_rows
from finetune.data.shipped import data_path
from finetune.distributed.environment import refuse_launched
from finetune.distributed.launchers import check_launch, plan_launch
from finetune.errors import ConfigError, FineTuneError, NonFiniteError
from finetune.evidence.memory import measure_framework
from finetune.evidence.packing_check import check_packing
from finetune.records import Batch, TokenizedRow
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune.run.folder import RunFolder
from finetune.tracking.tracker import require_trackers
from finetune.training.loop import LoopPlan, mean_loss, train
from finetune_strategies.tokenizers import KINDS, tokenizer_folder
from support.toy_session import LogitsOnly, ToySession

Case = Callable[[Path], Any]


def config_text(text: str, **how: Any) -> Case:
    """Load this text as a configuration file."""

    def load(folder: Path) -> Any:
        (folder / "job.yaml").write_text(text, encoding="utf-8")
        loaded = load_config(folder / "job.yaml", **{"environ": {}, "overrides": {}, "profile": None, **how})
        return resolve(loaded, ModelAndDataFacts(context_length=64, has_chat_template=False, train_rows=10))

    return load


def config_bytes(name: str, content: bytes) -> Case:
    """Load a file of this name as a configuration."""

    def load(folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return load_config(folder / name, environ={}, overrides={}, profile=None)

    return load


def data_text(content: bytes, name: str = "rows.jsonl") -> Case:
    """Read these bytes as a data file."""

    def read(folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return shape_rows(read_rows(folder / name))

    return read


def tokenizer(change: Callable[[Path], Any]) -> Case:
    """Open a tokenizer folder after a change."""

    def open_(folder: Path) -> Any:
        for file in tokenizer_folder(KINDS[0]).iterdir():
            shutil.copy(file, folder)
        change(folder)
        return FileTokenizer(folder)

    return open_


def settings_file(name: str, **values: Any) -> Callable[[Path], Any]:
    """Change values of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def trained(poison: dict[tuple[str, int], float], rows: int = 2) -> Case:
    """Train a session that tells something that is no number."""

    def go(folder: Path) -> Any:
        batch = Batch(tuple(TokenizedRow((1, 2), (True, True), f"rows.jsonl:{row}") for row in range(1, rows + 1)))
        session: Any = ToySession(poison=poison)
        if ("loss", 0) in poison:
            return mean_loss(session, [batch])
        return list(train(session, lambda epoch: [batch], [], LoopPlan(3, 1, 0.1, 0, "constant", 1)))

    return go


def packed(folder: Path) -> Any:
    """Check a session that mixes rows."""
    rows = tuple(TokenizedRow((1, 2), (True, True), "rows.jsonl:1") for _ in range(2))
    session: Any = type("Toy", (ToySession, LogitsOnly), {})(poison={("loss", 0): 3.0})
    return check_packing(session, Batch(rows, (2,)), "float32")


def checkpoint(change: Callable[[Path], Any], identity: dict[str, Any]) -> Case:
    """Open a checkpoint after a change."""

    def open_(folder: Path) -> Any:
        store = CheckpointStore(folder / "checkpoints")
        path = store.save(3, lambda place: (place / "state.bin").write_bytes(b"abc"), Owner({"seed": 1, "rank": 8}, {}))
        change(path)
        return store.open(3, identity)

    return open_


def claimed_twice(folder: Path) -> Any:
    """Two at work in one folder."""
    first = RunFolder(folder)
    first.claim()
    try:
        return RunFolder(folder).claim()
    finally:
        first.release()


def nowhere(folder: Path) -> Any:
    """Go on with the newest run where there is none."""
    with contextlib.chdir(folder):
        return RunFolder.unfinished(None)


def made(name: str, kind: str, then: Callable[[Path], Any]) -> Case:
    """Make a file, a folder with something in it or a link of this name, then do something with it."""

    def go(folder: Path) -> Any:
        path = folder / name
        if kind == "file":
            path.write_text("a")
        elif kind == "link":
            path.symlink_to(folder)
        elif kind == "full":
            path.mkdir()
            (path / "a").write_text("a")
        elif kind == "plan":
            path.mkdir()
            (path / "plan.yaml").write_text("{}")
        return then(path)

    return go


ROWS = (
    '{"prompt": "a"}\n{"prompt": 3, "completion": "b"}\n{"a": 1}\n{"text": "a", "messages": []}\n'
    '{"messages": 3}\n{"messages": [3]}\n{"messages": [{"role": "robot", "content": "a"}]}\n'
    '{"messages": [{"role": "user", "content": 4}]}\n{"text": "\\ud800"}\n{"instruction": "a"}\n'
)
CASES: dict[str, Case] = {
    **{
        f"config {text!r}": config_text(text)
        for text in (
            "training: {learing_rate: 1, seed: 0}",
            "traning: {}",
            "lr: 3",
            "3",
            "template: {name: chatml, size: 3}",
            "template: tokenizer",
            "tokens: {max_length: 65}",
            "judge: {memory_length: 65}",
            "data: {valid: a.jsonl, valid_fraction: 0.1}",
            "adapter: {target_modules: [3]}",
            "training: {seed: 4294967296, epochs: 0, batch_size: 0}",
        )
    },
    "config environment": config_text(
        "",
        environ={
            "FT_TRAINING__SED": "1",
            "FT_TRAINING_SEED": "1",
            "FT_TRAINING__SEED": "x",
            "FT_PROFILE": "chta",
            "FT_NOTHING__HERE": "1",
        },
    ),
    "config environment twice": config_text("", environ={"FT_TEMPLATE": "chatml", "FT_TEMPLATE__NAME": "alpaca"}),
    "config flags": config_text("", overrides={"training.seed": "x", "training.sed": 1, "adapter.rank": -1}),
    **{
        f"config {name}": config_text(text)
        for name, text in (
            ("hexadecimal giant", "training:\n  seed: 0x" + "f" * 5000 + "\n"),
            ("of other things", "a" * 2_000_000),
        )
    },
    "config profile": config_text("", profile="chta"),
    **{f"config file {name}": config_bytes(name, content) for name, content in (("job", b"a: 1"), ("job.csv", b"a"))},
    "config assignments": lambda folder: parse_assignments(["training.seed", "=1", "training.sed=1", "seed=1"]),
    "config plan": made("plan.yaml", "file", load_plan),
    "config tiny model": lambda folder: resolve(
        load_config(None, environ={}, overrides={}, profile=None), ModelAndDataFacts(4, True, 1)
    ),
    "data rows": data_text(ROWS.encode()),
    "data rows.jsonl broken": data_text(b"{\n[\n"),
    "data nobody's home": lambda folder: data_path("~nosuchuser/rows.jsonl"),
    **{
        f"tokenizer {name}": tokenizer(change)
        for name, change in {
            "no end": settings_file("tokenizer_config.json", eos_token=None),
            "unknown end": settings_file("tokenizer_config.json", eos_token="<nope>"),
            "unknown pad": settings_file("tokenizer_config.json", pad_token="<nope>"),
        }.items()
    },
    "trackers missing": lambda folder: require_trackers(["trackery"]),
    "trackers missing, two": lambda folder: require_trackers(["trackery", "trackest"]),
    **{
        f"nothing held out {words}": config_text(f"training: {{{words}}}")
        for words in (
            "early_stopping_patience: 3",
            "load_best_model: true, early_stopping_patience: 1",
            "early_stopping_min_delta: 0.1",
        )
    },
    **{f"trackers {words}": config_text(f"tracking: {{to: {words}}}") for words in ("wandb", "tensorbord")},
    "memory backend": lambda folder: measure_framework("reference"),
    "training clip_gradients 2 of 5": trained({("clip_gradients", 2): float("nan")}, 5),
    "training loss": trained({("loss", 0): float("inf")}, 6),
    "training packed": packed,
    "run output is not empty": made("a", "full", RunFolder.place),
    "run claimed": claimed_twice,
    "run events are not whole": lambda folder: RunFolder(folder).events_up_to(3),
    "run unfinished is nowhere": nowhere,
    "run finished is none": made("a", "full", RunFolder.finished),
    "checkpoint changed": checkpoint(lambda path: (path / "state.bin").write_bytes(b"abd"), {}),
    "checkpoint of no identity": checkpoint(settings_file("checkpoint.json", identity=[]), {}),
    "checkpoint torn": checkpoint(lambda path: (path / "checkpoint.json").write_text("{"), {}),
    "checkpoint of others": checkpoint(lambda path: None, {"seed": 2, "rank": 8, "alpha": 1.0}),
}


CASES |= {
    "adapter of a whole model": config_text("adapter: {kind: full, rank: 3}", profile="chat"),
    "adapter of other trainers": config_text("adapter: {kind: QLoRA}\nmodel: {load_in_4bit: true}\nq_group_size: 32"),
    "quantised by the reference": config_text("model: {quantize: 4bit}\nbackend: reference"),
    "quantised as torch alone does": config_text("model: {quantize: fp4}\nbackend: mlx"),
    "quantised and whole": config_text("model: {quantize: 8bit}\nbackend: mlx\nadapter: {kind: full}"),
    "quantised in groups of nothing": config_text("model: {quantize_group_size: 32}\nbackend: mlx"),
    "quantised as nobody does": config_text("model: {quantize: 4, quantize_group_size: 48}"),
}


def launched(*asked: Any, text: str = "num_machines: 1\n") -> Case:
    """Ask for a launch by launcher, processes and accelerate's file, with a backend and an environment."""

    def go(folder: Path) -> Any:
        (folder / "a.yaml").write_text(text)
        launcher, processes, file, backend, environ = asked
        found = plan_launch(launcher, processes, folder / file if file else None, planned=None)
        return check_launch(found, backend, environ)

    return go


CASES |= {
    "launch without a launcher": launched(None, 2, None, "torch", {}),
    "launch file without a launcher": launched(None, None, "a.yaml", "torch", {}),
    "launch by nobody": launched("deepspeed", 2, None, "torch", {}),
    "launch of how many": launched("torchrun", None, None, "torch", {}),
    "launch of one": launched("mlx.launch", 1, None, "mlx", {}),
    "launch file of nobody": launched("torchrun", 2, "a.yaml", "torch", {}),
    "launch file missing": launched("accelerate", None, "b.yaml", "torch", {}),
    "launch file broken": launched("accelerate", None, "a.yaml", "torch", {}, text="a: [\n"),
    "launch file of mpirun": launched("accelerate", 2, "a.yaml", "torch", {}, text="distributed_type: MULTI_CPU\n"),
    "launch file of how many": launched("accelerate", None, "a.yaml", "torch", {}),
    "processes of others": lambda folder: refuse_launched({"MLX_RANK": "0", "MLX_HOSTFILE": "h"}, "torch"),
    "processes of nobody's": lambda folder: refuse_launched({"RANK": "0", "WORLD_SIZE": "2"}, "reference"),
    "processes not started": lambda folder: resolve_processes(
        load_config(None, environ={}, overrides={"training.processes": 3}, profile=None), 1, resume=False
    ),
}


# Where a case's name begins like this: the exit code, and what the message names. The first that fits counts.
EXPECTED = {
    "config assignments": (2, "--set training.seed"),
    "config environment twice": (2, "FT_TEMPLATE__NAME"),
    "config environment": (2, "FT_TRAINING__SED"),
    "config file": (2, "HERE/job"),
    "config flags": (2, "--set training.sed"),
    "config plan": (2, "HERE/plan.yaml"),
    "config profile": (2, "--profile"),
    "config tiny model": (2, "model.path"),
    "config 'template: tokenizer'": (2, "template.name (file)"),
    "config 'tokens": (2, "tokens.max_length (file)"),
    "config 'judge": (2, "judge.memory_length (file)"),
    "config 'data": (2, "data.valid_fraction (file)"),
    "config": (2, "HERE/job.yaml"),
    "data nobody": (3, "~nosuchuser/rows.jsonl"),
    "data": (3, "HERE/rows"),
    "tokenizer unknown": (3, "'<nope>'"),
    "tokenizer": (3, "HERE"),
    "trackers missing": (3, "trackery"),
    "trackers": (2, "tracking.to"),
    "nothing held out early_stopping_min_delta": (2, "training.early_stopping_min_delta (file)"),
    "nothing held out": (2, "training.early_stopping_patience (file)"),
    "memory backend": (2, "reference"),
    "training clip_gradients": (1, "nan at step 3 (rows rows.jsonl:"),
    "training loss": (1, "inf (rows rows.jsonl:"),
    "training packed": (1, "this model"),
    "run unfinished is nowhere": (3, "runs/"),
    "run": (3, "HERE"),
    "checkpoint of others": (3, "seed"),
    "checkpoint": (3, "HERE/checkpoints/step-00000003"),
    "adapter of a whole model": (2, "adapter.rank (file)"),
    "adapter of other trainers": (2, "HERE/job.yaml:2 model.load_in_4bit"),
    "quantised by the reference": (2, "model.quantize (file)"),
    "quantised as torch alone does": (2, "model.quantize (file)"),
    "quantised and whole": (2, "model.quantize (file)"),
    "quantised": (2, "model.quantize_group_size"),
    "launch without a launcher": (2, "--processes"),
    "launch file without": (2, "--launch-config"),
    "launch file of mpirun": (3, "HERE/a.yaml"),
    "launch file of how many": (2, "--launch"),
    "launch file": (2, "--launch-config"),
    "launch by nobody": (2, "'deepspeed'"),
    "launch of one": (2, "one process"),
    "launch": (2, "--launch"),
    "processes of": (3, "has started several processes"),
    "processes not started": (2, "training.processes (flag)"),
}
PROBLEMS = {"config environment": 5, "config flags": 3, "config assignments": 2, "adapter of other trainers": 3}
PROBLEMS |= {"quantised as nobody does": 2, "nothing held out load_best_model: true, early_stopping_patience: 1": 2}
PROBLEMS |= {"config 'training: {seed: 4294967296, epochs: 0, batch_size: 0}'": 3}
"""How many problems are told at once, where they are several."""
SELF_EVIDENT = ("tokenizer unknown end", "tokenizer unknown pad", "launch file of nobody")
"""What is refused without a hint."""
WORDED = {
    "config 'training: {learing_rate: 1, seed: 0}'": "1 problem in the configuration:\n"
    "  HERE/job.yaml:1 training.learing_rate: there is no setting `training.learing_rate`\n"
    "    hint: did you mean learning_rate?",
    "config 'training: {seed: 4294967296, epochs: 0, batch_size: 0}'": "3 problems in the configuration:\n"
    "  HERE/job.yaml:1 training.seed: seed must be a whole number from 0 to 4294967295; it is 4294967296\n"
    "    hint: leave it out for the default, 0\n"
    "  HERE/job.yaml:1 training.epochs: epochs must be a number above 0, or null; it is 0\n"
    "    hint: leave it out for the default, null\n"
    "  HERE/job.yaml:1 training.batch_size: batch_size must be a whole number of at least 1; it is 0\n"
    "    hint: leave it out for the default, 8",
    "run output is not empty": "output folder HERE/a exists and is not empty\n"
    "  hint: a run folder is never reused: choose a new --output, or continue that run with --resume",
    "training clip_gradients 2 of 5": "the gradient norm became nan at step 3 (rows rows.jsonl:1, "
    "rows.jsonl:2, rows.jsonl:3, rows.jsonl:4 and 1 more); the weights are those of step 2\n"
    "  hint: lower training.learning_rate, or look for broken rows at those places",
    "data rows.jsonl broken": "the data cannot be used:\n"
    "  HERE/rows.jsonl:1: broken JSON at column 2: Expecting property name enclosed in double quotes\n"
    "  HERE/rows.jsonl:2: broken JSON at column 2: Expecting value\n"
    "  hint: each line must be one JSON object",
}
"""Five of them in the words that users know."""


@pytest.mark.parametrize("name", CASES)
def test_refusal_names_its_place_and_says_how_to_mend_it(name: str, tmp_path: Path) -> None:
    """Each of these bad inputs ends with its exit code, its place, a hint for each problem, and no word is lost."""
    with pytest.raises((FineTuneError, NonFiniteError)) as caught:
        CASES[name](tmp_path)
    said = str(caught.value).replace(str(tmp_path), "HERE")
    code, place = next(expected for begin, expected in EXPECTED.items() if name.startswith(begin))
    assert caught.value.exit_code == code
    assert place in said
    problems = PROBLEMS.get(name, 1)
    assert said.count("hint: ") == (0 if name in SELF_EVIDENT else problems)
    if isinstance(caught.value, ConfigError):
        assert [bool(problem.what and problem.where) for problem in caught.value.problems] == [True] * problems
    assert said == WORDED.get(name, said)


def test_refusals_are_many() -> None:
    """The worded examples, and those without a hint, are cases; other rooms have tables of their own."""
    assert {*WORDED, *SELF_EVIDENT, *PROBLEMS} <= set(CASES)
    assert len(CASES) >= 60
    with pytest.raises(ValueError, match="size must not be negative, got -1"):
        new_facts(-1, 0)
