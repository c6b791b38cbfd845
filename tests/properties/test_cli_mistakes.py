"""Mistakes on the command line: each is answered in three lines, with what was meant and the line to type next."""

import json
from pathlib import Path

import pytest
import typer

from finetune.cli.app import VERBS, app, run

TWO_ROWS = 160
"""Letters of a line that takes two rows of a terminal of 80 columns."""
ROW = json.dumps({"prompt": "Say one", "completion": "one"}) + "\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: rows, a configuration, a model's folder and a run's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FT_BACKEND", "reference")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = {
        "rows.jsonl": ROW * 2,
        "rows.json": json.dumps([json.loads(ROW)]),
        "rows.txt": ROW * 2,
        "rows.csv": "prompt,completion\na,b\n",
        "finetune.yaml": "backend: reference\n",
        "model/config.json": "{}",
        "tiny.gguf": "",
        "finding.json": "{}",
        "deep.toml": "a = " + "[" * 20_000 + "]" * 20_000,
        "runs/first/plan.yaml": "backend: reference\n",
        "runs/first/run.json": "{}",
        "runs/first/files/a.txt": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("trian", 2, ("no command 'trian'", "`ft train`")),
        ("serve runs/first", 2, ("no command 'serve'", "`ft deploy`")),
        ("LS", 2, ("no command 'LS'", "`ft runs`")),
        ("train --dpo", 2, ("no option --dpo", "--set training.objective=dpo?")),
        ("train --bf16", 2, ("no option --bf16", "--set model.dtype=bfloat16?")),
        ("train --load-in-4bit --epochs 1", 2, ("--set model.quantize=4bit?",)),
        ("train --gradient-checkpointing", 2, ("--set training.gradient_checkpointing=true?",)),
        ("check --set tracking.to=wandbb", 2, ("['wandbb']", "write a list: [wandb]")),
        ("check --set training.optimizer=x", 2, ("no setting `training.optimizer`", "`ft init -`")),
        ("check --model runs", 3, ("runs has no config.json", "--model runs/first")),
        ("check --model runs/first/files", 3, ("no config.json", "--model runs/first")),
        ("check --model referenc-llama", 3, ("did you mean reference-llama?",)),
        ("check --data runs/first", 3, ("is a run, and no data", "--model runs/first")),
        ("chat reference-llama", 3, ("is a model, and no run", "ft train --model reference-llama")),
        ("report runs", 3, ("holds no run", "ft report runs/first")),
        ("replay finetune.yaml", 2, ("finetune.yaml is no finding: it is no JSON", "ft verify")),
        ("xyzzy", 2, ("no command 'xyzzy'", "`ft --help`")),
        ("train --epochz 1", 2, ("no option --epochz", "did you mean --epochs?")),
        ("train --lora-r 4", 2, ("no option --lora-r", "--rank 4")),
        ("train --save-steps=10", 2, ("no option --save-steps", "--set training.save_every=10")),
        ("train --warmup_ratio 0.1", 2, ("no option --warmup-ratio", "--set training.warmup_fraction=0.1")),
        ("estimate --gradient-accumulation-steps 2", 2, ("--set training.gradient_accumulation_steps=2",)),
        ("runs --zzz", 2, ("ft runs has no option --zzz", "`ft runs --help`")),
        ("train --epochs", 2, ("--epochs", "`ft train --help`")),
        ("evaluate", 2, ("ft evaluate needs RUN", "latest")),
        ("deploy first", 2, ("ft deploy needs --to", "llama.cpp")),
        ("verify --tier 9", 2, ("--tier 9: ", "2: training")),
        ("train finetune.yaml rows.jsonl", 2, ("no rows.jsonl there", "--data rows.jsonl")),
        ("train rows.jsonl", 2, ("rows.jsonl: this is data", "hint: --data rows.jsonl")),
        ("check rows.json", 2, ("rows.json: this is data", "hint: --data rows.json")),
        ("check rows.txt", 2, ("rows.txt: this is data", "hint: --data rows.txt")),
        ("estimate rows.csv", 2, ("rows.csv: this is data", "hint: --data rows.csv")),
        ("check finetun.yaml", 2, ("no such file", "did you mean finetune.yaml?")),
        ("check elsewhere/finetune.yaml", 2, ("no such file", "`ft init`")),
        ("train model", 2, ("model: this is a model", "hint: --model model")),
        ("train runs/first", 2, ("runs/first: this is a run", "ft report runs/first")),
        ("check --backend jax", 2, ("--backend: backend must be one of torch, mlx, reference",)),
        ("check --rank few", 2, ("--rank (adapter.rank): ", "'few'")),
        ("check --rank 2 --set adapter.rank=few", 2, ("--set adapter.rank: ", "'few'")),
        ("evaluate model", 3, ("holds no run", "ft train --model model")),
        ("report frist", 3, ("did you mean runs/first?",)),
        ("train --resume frist", 3, ("did you mean runs/first?",)),
        ("train --resume --output runs/frist", 3, ("did you mean runs/first?",)),
        ("train --resume finetune.yaml", 2, ("not from finetune.yaml", "ft train --resume RUN")),
        ("check --data row.jsonl", 3, ("data file row.jsonl does not exist", "did you mean rows.jsonl?")),
        ("check --model modle", 3, ("unknown model 'modle'", "did you mean model?")),
        ("check --model rows.jsonl", 3, ("is a file", "--data rows.jsonl")),
        ("judge --tuned modle --train rows.jsonl", 2, ("--tuned modle is no folder", "did you mean model?")),
        ("judge --tuned runs/first --train rows.jsonl", 2, ("is a run", "ft report runs/first")),
        ("import tiny.ggf", 3, ("tiny.ggf does not exist", "did you mean tiny.gguf?")),
        ("compare first --through merge", 2, ("no path 'merge'", "did you mean merged?")),
        ("prove --fault A002x", 2, ("no fault 'A002x'", "did you mean A002?")),
        ("verify --law mask.answr", 2, ("no law 'mask.answr'", "did you mean mask.answers?")),
        ("replay findin.json", 2, ("findin.json cannot be read", "did you mean finding.json?")),
        (f"train --resume {'9' * 999}", 2, ("cannot be a path: File name too long",)),
        ("verify --subject deep.toml", 2, ("deep.toml is no TOML",)),
        ("init --recipe qwen3-4", 2, ("did you mean qwen3-4b?",)),
    ],
)
def test_mistake_is_answered_in_three_lines(
    line: str, code: int, told: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer names what was typed, what was meant, and the line to type next; no usage text, no traceback."""
    before = sorted(path for path in here.rglob("*"))
    assert run(line.split()) == code
    both = "".join(capsys.readouterr())
    assert [words for words in told if words not in both] == []
    assert len(both.splitlines()) <= 3, both
    assert max(map(len, both.splitlines())) <= TWO_ROWS, both
    assert "hint: " in both
    assert "Usage:" not in both
    assert sorted(path for path in here.rglob("*")) == before


@pytest.mark.parametrize(
    ("assignment", "names"),
    [
        ("adapter.target_modules=q_proj,v_proj", ["q_proj", "v_proj"]),
        ("adapter.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("adapter.target_modules=q_proj", ["q_proj"]),
        ("adapter.target_modules=all-linear", "all-linear"),
        ("tracking.to=wandb, mlflow", ["wandb", "mlflow"]),
        ("adapter.modules_to_save=null", None),
    ],
)
def test_names_typed_with_commas_are_a_list(assignment: str, names: object) -> None:
    """In a shell `a,b` is a list where a setting takes one; what else it takes stays what it is."""
    from finetune.config import load_config, parse_assignments

    overrides = parse_assignments([assignment])
    assert overrides == {assignment.partition("=")[0]: names}
    load_config(None, environ={}, overrides=overrides, profile=None)


def test_help_lists_every_command_in_its_group_with_a_whole_summary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 80 columns no summary is cut or broken, and no command is left out."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    summaries = [summary for group in VERBS.values() for summary in group.values()]
    assert len(summaries) == len(app.registered_commands) >= 18
    assert [said for said in summaries if not any(line.endswith(f"  {said}") for line in lines)] == []
    assert {f"{title}:" for title in VERBS} <= set(lines)
    assert max(map(len, lines)) <= 80


def test_usage_lines_show_names_as_they_are_typed() -> None:
    """What is needed stands bare, what may be left out in brackets."""
    group = typer.main.get_command(app)
    for name, line in {
        "train": "[CONFIG]",
        "evaluate": "RUN",
        "report": "[RUN]...",
        "import": "FILE.gguf [OUTPUT]",
    }.items():
        command = group.commands[name]  # type: ignore[attr-defined]
        context = command.context_class(command, info_name=name)
        assert " ".join(command.collect_usage_pieces(context)) == f"[OPTIONS] {line}"


@pytest.mark.parametrize(
    ("through", "code"), [(None, 0), ("merged", 0), ("gguf-f16", 3), ("merged,gguf-f16", 3), ("merged,gguf-q8_0", 1)]
)
def test_path_that_is_named_and_cannot_be_compared_is_no_success(
    through: str | None, code: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ft compare --through` that skips what it was asked for ends with 3 and the reason; a failure counts more."""
    from finetune.compare.comparison import PATHS, Comparison, PathResult
    from finetune.records import Outcome

    outcomes = {"merged": Outcome.PASSED, "gguf-f16": Outcome.NOT_APPLICABLE, "gguf-q8_0": Outcome.FAILED}

    def compared(run: Path, names: list[str], tell: object) -> Comparison:
        asked = names if through else ["merged", "gguf-f16"]
        rows = tuple(PathResult(name, "", outcomes[name], "needs gguf") for name in asked)
        return Comparison("first", "torch", {}, 0, (PathResult("trainer", "", None), *rows), (), {})

    monkeypatch.setattr("finetune.compare.comparison.compare_paths", compared)
    assert set(outcomes) <= set(PATHS)
    assert run(["compare", "first", *(["--through", through] if through else [])]) == code
    assert ("gguf-f16: needs gguf" in capsys.readouterr().err) == (code == 3)
