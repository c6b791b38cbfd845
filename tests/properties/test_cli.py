"""The `ft` command as programs rely on it: exit codes, where output goes, bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.cli.app import run, with_hyphens
from finetune.cli.options import ConfigOptions
from finetune.errors import ConfigError

ROWS = [{"prompt": f"Say {word}", "completion": word} for word in ("one", "two", "three", "four")]


@pytest.fixture(autouse=True)
def _backend_that_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier 1 has no ML framework, and `ft check` rightly calls a backend without its libraries a problem."""
    monkeypatch.setenv("FT_BACKEND", "reference")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_check_of_the_shipped_job_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments the shipped model and data are checked, they are good, and it is said what the run will be."""
    assert run(["check"]) == 0
    said = capsys.readouterr().out
    first, *lines = said.splitlines()
    assert first == "no problems"
    assert "  training.epochs 30 (profile), training.learning_rate 0.002 (profile)" in lines
    assert "  450 steps, 80,850 tokens, 9,390 of them trained" in lines
    assert "facts.jsonl:1: 23 tokens, 3 of them learned (in ⟦ ⟧)" in said
    assert lines[-1] == "    ⟦A ccra <|eot_id|>⟧"
    assert run(["check", "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)["runs"]
    assert (told["steps"], told["tokens"], told["trained_tokens"]) == (450, 80_850, 9_390)
    assert told["settings"]["training.epochs"] == {"value": 30.0, "origin": "profile"}
    assert (told["minutes"] is None) == (told["not_estimated"] is not None)


@pytest.mark.parametrize(
    ("outcome", "codes"),
    [("passed", (0, 0)), ("failed", (1, 1)), ("inconclusive", (4, 0)), ("not applicable", (4, 4)), ("error", (4, 4))],
)
def test_train_ends_with_the_code_of_its_outcome(
    outcome: str, codes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a run that passed ends with 0; `judge.allow_inconclusive` makes it 0 where too little was measured, too."""
    monkeypatch.setattr("finetune.train.fine_tune", lambda *given, **more: (Path("run"), {"outcome": outcome}))
    assert run(["train", "--json"]) == codes[0]
    assert run(["train", "--json", "--set", "judge.allow_inconclusive=true"]) == codes[1]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["check", "missing.yaml"], 2, "missing.yaml"),
        (["check", "--set", "training.learning_rat=1"], 2, "learning_rate"),
        (["check", "--set", "adapter.rank=0"], 2, "adapter.rank"),
        (["check", "--set", "training.batch_size=0"], 2, "training.batch_size"),
        (["check", "--set", "adapter.rank=500"], 3, "rank 500"),
        (["check", "--set", "adapter.target_modules=[q_prj]"], 3, "q_proj"),
        (["check", "--set", "adapter.rank_pattern={q_prj: 2}"], 3, "adapter.rank_pattern"),
        (["check", "--set", "adapter.modules_to_save=[nrm]"], 3, "adapter.modules_to_save"),
        (["check", "--model", "no-such-model"], 3, "reference-llama"),
        (["check", "--template", "chatlm"], 2, "chatml"),
        (["check", "--data", "missing.jsonl"], 3, "missing.jsonl"),
        (["check", "--data", "."], 3, "folder"),
        (["train", "--no-such-option"], 2, "no-such-option"),
        (["train", "--set", "training.seed"], 2, "training.seed"),
        (["report", "no-such-run"], 3, "no-such-run"),
        (["evaluate", "."], 3, "run.json"),
        (["no-such-verb"], 2, "no-such-verb"),
    ],
)
def test_bad_input_ends_with_the_contract_code_and_names_the_value(
    arguments: list[str], code: int, named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage errors end with 2 and refusals with 3, and the message names the value or what to use instead."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(arguments) == code
    told = capsys.readouterr()
    assert named in told.out + told.err


def test_check_names_every_problem_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken data, an impossible rank and a missing model layer are all told in one go."""
    data = write(tmp_path / "bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert run(["check", "--data", data, "--set", "adapter.rank=400", "--json"]) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert {problem["where"] for problem in problems} == {"data.train", "adapter"}
    assert "bad.jsonl:2" in next(problem["what"] for problem in problems if problem["where"] == "data.train")


def test_check_shows_what_becomes_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows by file and shape, drops with a place, tokens, lengths, unread columns and overlap, in 80 columns."""
    good = [{"prompt": f"p{n} is {n}", "completion": "word " * (1 + n % 9), "source": "me"} for n in range(20)]
    odd = [{"instruction": "do it", "output": ""}, {"prompt": "long", "completion": "word " * 90}]
    file = write(tmp_path / "r.jsonl", "".join(json.dumps(row) + "\n" for row in [*good, *odd]))
    valid = write(tmp_path / "v.jsonl", "".join(json.dumps(row) + "\n" for row in [good[3], {"text": "another thing"}]))
    words = ["check", "--data", file, "--set", f"data.valid={valid}", "--set", "tokens.max_length=64"]
    assert run(words) == 0
    said = capsys.readouterr().out
    told = " ".join(said.split())
    for each in (
        "no problems WARNING: data.train: 9.1% of the rows are dropped (2 of 22): ",
        "data.train: 22 rows read, 20 kept, 2 dropped",
        f"dropped: 1 empty answer (first: {file}:21)",
        f"dropped: 1 longer than 64 tokens (first: {file}:22)",
        "shapes: prompt/completion 21, alpaca 1",
        f"20 from {file}",
        "data.valid: 2 rows read, 1 kept, 1 dropped",
        f"note: {file}: columns that were not read: source",
        f"1 of 2 rows stand in the rows trained on: 1 word for word ({valid}:1 as {file}:4)",
        "of them trained (",
        "0 rows truncated",
    ):
        assert each in told, each
    folded = [line for line in said.partition("tokens, ")[0].splitlines() if str(tmp_path) not in line]
    assert max(map(len, folded)) <= 80
    bars = re.findall(r"^ +[\d,]+ to +[\d,]+ [█ ]{40} ([\d,]+)$", said, re.M)
    [shown] = [json.loads(capsys.readouterr().out)["runs"][0] for _ in [run([*words, "--json"])]]
    steps = [*shown["rows"]["lengths"]["steps"], *shown["valid"]["lengths"]["steps"]]
    assert bars == [str(rows) for *_, rows in steps]
    assert sum(rows for *_, rows in shown["rows"]["lengths"]["steps"]) == 21
    assert shown["overlap"]["valid"]["alike"]["row"] == 1
    assert shown["warnings"]
    assert any("columns that were not read: source" in note for note in shown["notes"])


def test_check_judges_each_of_several_files(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file is judged by itself under its name, and a wrong one (2) counts more than one that is refused (3)."""
    job = f"backend: reference\nmodel: {{path: {model}}}\ndata: {{train: {data}}}\n"
    good, refused, wrong = (
        write(tmp_path / f"{name}.yaml", job + text)
        for name, text in (
            ("good", "adapter:\n  rank: 2\n"),
            ("refused", "adapter:\n  rank: 400\n"),
            ("wrong", "training:\n  epochs: none\n"),
        )
    )
    codes = [run(["check", *files]) for files in ([good, good], [good, refused], [refused, wrong], [wrong, refused])]
    assert codes == [0, 3, 2, 2]
    told = capsys.readouterr().out
    assert (told.count(f"{good}: no problems"), told.count(f"{refused}: 1 problem:")) == (3, 3)
    assert run(["check", good, refused, wrong, "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem["file"] for problem in problems] == [refused, wrong]


def test_check_finds_what_only_the_whole_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are all too long and a backend that is not installed are found before training starts."""
    monkeypatch.setattr("finetune.abilities.find_spec", lambda library: None)
    rows = write(tmp_path / "rows.jsonl", json.dumps({"prompt": "word " * 300, "completion": "x"}) + "\n")
    assert run(["check", "--data", rows, "--set", "tokens.max_length=32", "--set", "backend=mlx", "--json"]) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert {problem["where"] for problem in problems} == {"data", "backend"}
    assert "no row" in problems[0]["what"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "format"),
        ('{"format": 99}', "99"),
        ('{"format": 2, "model": {}, "data": {}, "losses": "x", "versions": {}}', "losses"),
        (
            '{"format": 2, "model": {}, "data": {}, "losses": {}, "versions": {}, "plan": [], "notes": [], '
            '"verdicts": [{"outcome": "great"}]}',
            "great",
        ),
    ],
)
def test_damaged_run_is_refused(text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A `run.json` that is not what this version writes is refused with what is wrong, and never shown as fine."""
    write(tmp_path / "run.json", text)
    assert run(["report", str(tmp_path)]) == 3
    told = capsys.readouterr().err
    assert named in told
    assert "hint: " in told


def test_init_writes_a_file_that_checks_and_never_overwrites(tmp_path: Path) -> None:
    """`ft init` gives a file that `ft check` accepts, and refuses to replace it."""
    path = tmp_path / "mine.yaml"
    assert run(["init", str(path)]) == 0
    assert run(["check", str(path)]) == 0
    before = path.read_bytes()
    assert run(["init", str(path)]) == 3
    assert path.read_bytes() == before


def test_schema_is_a_closed_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """`ft schema` prints JSON that refuses unknown keys."""
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False


def test_output_that_exists_is_refused_untouched(rows: Path, tmp_path: Path) -> None:
    """A run folder is never reused, and a file is never taken for one."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("keep")
    assert run(["train", "--data", str(rows), "--output", str(taken)]) == 3
    assert run(["train", "--data", str(rows), "--output", str(taken / "precious")]) == 3
    assert [path.name for path in taken.iterdir()] == ["precious"]
    assert (taken / "precious").read_text() == "keep"


def test_option_names_take_hyphens_and_underscores() -> None:
    """An option may be written either way, and values are never touched."""
    assert with_hyphens("--max_new_tokens=a_b") == "--max-new-tokens=a_b"
    assert with_hyphens("--set") == "--set"
    assert with_hyphens("training.batch_size=1") == "training.batch_size=1"


def test_short_options_are_the_settings_that_they_name() -> None:
    """--epochs, --lr, --batch-size, --rank and --max-steps set what `--set` sets, also in a launched process."""
    short = ConfigOptions(epochs="2", lr="1e-3", batch_size="4", rank="3", max_steps="7")
    config = short.load(None).config
    assert (config.training.epochs, config.training.learning_rate, config.training.batch_size) == (2, 1e-3, 4)
    assert (config.adapter.rank, config.training.max_steps) == (3, 7)
    assert short.words() == ["--epochs=2", "--lr=1e-3", "--batch-size=4", "--rank=3", "--max-steps=7"]
    with pytest.raises(ConfigError, match=r"training\.batch_size"):
        ConfigOptions(batch_size="few").load(None)
    assert run(["check", "--batch-size", "0"]) == 2


@pytest.mark.slow
def test_start_is_quick(model: Path, data: Path) -> None:
    """`ft --help` and `ft check` start within the contract: no framework is loaded on the way.

    Seconds are no law on a shared machine, so what is judged is the reason for slowness: the modules.
    """
    job = ["check", "--backend", "reference", "--model", str(model), "--data", str(data), "--set", "adapter.rank=2"]
    code = (
        f"import sys; from finetune.cli.app import run; print(run({job})); "
        "print([name for name in ('torch', 'transformers', 'peft', 'mlx', 'matplotlib', 'huggingface_hub') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.splitlines()[-2:] == ["0", "[]"], done.stderr
    code = (
        "import sys; from finetune.cli.app import run; run(['--help']); "
        "print(*{name.split('.')[1] for name in sys.modules if name.startswith('finetune.')})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert set(done.stdout.splitlines()[-1].split()) == {"cli", "errors", "processes", "words"}


def test_ctrl_c_before_the_first_word_is_told_as_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever interrupts while the program is still being loaded gets 130 too, and no traceback."""

    class Impatient:
        """Ctrl-C where the verbs are looked for."""

        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            """Interrupt."""
            if name == "finetune.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "finetune.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Impatient, *sys.meta_path])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        main()
    assert getattr(ended.value, "code", None) == 130
