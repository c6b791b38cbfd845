"""Laws of the wheel: what others install holds the program, its models and the strategies, and works anywhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="needs build: pip install 'finetune-suite[dev]'")
pytest.importorskip("hatchling", reason="needs hatchling, with which the wheel is built: pip install hatchling")

ROOT = Path(__file__).parents[2]
DRAW = """
import sys
import finetune, finetune_strategies
assert all(module.__file__.startswith(sys.argv[1]) for module in (finetune, finetune_strategies))
from hypothesis import given, settings, strategies as st
from finetune import TrainingConfig
from finetune_strategies.adapters import adapted_models
found = []
@given(st.from_type(TrainingConfig), adapted_models())
@settings(database=None, max_examples=50, deadline=None)
def draw(config, model):
    found.append(config)
draw()
assert sum(config != TrainingConfig() for config in found) > 20
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel has been installed, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=300)
    return folder


def environment(installed: Path) -> dict[str, str]:
    """Ours, but with the installed package before the source tree; nothing is asked of any network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FT_", "PYTHON", "HYPOTHESIS_"))}
    return {**kept, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def test_wheel_holds_what_is_needed_and_nothing_else(wheel: Path) -> None:
    """Both packages with their templates, shipped models and data are in it; tests, caches and builds are not."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"finetune", "finetune_strategies"}
    for ending in ("finetune/py.typed", ".j2", "model.safetensors", "tokenizer.json", ".jsonl", "strategies/py.typed"):
        assert any(name.endswith(ending) for name in names), ending
    assert not [name for name in names if "__pycache__" in name or "test_" in name]
    assert len([name for name in names if name.endswith(".py")]) > 100


def test_wheel_draws_our_types_from_a_fresh_install(installed: Path, tmp_path: Path) -> None:
    """With the wheel installed, `st.from_type(TrainingConfig)` and the strategies work in an empty folder."""
    command = [sys.executable, "-c", DRAW, str(installed)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(installed), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_wheel_runs_the_program_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """The installed `ft` tells its help and checks the shipped job where there is no source tree."""
    check = ["check", "--set", "backend=reference"]
    for name, arguments, told in (
        ("ft", ["--help"], "train"),
        ("ft", check, "no problems"),
        # `uvx finetune-suite` runs the program that has the package's name.
        ("finetune-suite", check, "no problems"),
    ):
        command = [sys.executable, str(installed / "bin" / name), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(installed), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", ["venv", "uv"])
def test_hint_installs_into_the_environment_that_asks(by: str, wheel: Path, installed: Path, tmp_path: Path) -> None:
    """In a fresh environment of either maker the line that a hint prints is one that runs, and that installs there."""
    if by == "uv" and shutil.which("uv") is None:
        pytest.skip("needs uv: pip install uv")
    place = tmp_path / "an environment"
    make = ["uv", "venv", "--offline", "--quiet"] if by == "uv" else [sys.executable, "-m", "venv"]
    subprocess.run([*make, str(place)], check=True, timeout=120)
    ask = "import finetune.errors; print(finetune.errors.install_line('gguf'))"
    for python, folder in ((place / "bin" / "python", Path.cwd()), (Path("an environment/bin/python"), tmp_path)):
        done = subprocess.run(
            [str(place / "bin" / "python"), "-c", ask],
            cwd=folder,
            env=environment(installed),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        words = shlex.split(done.stdout)
        assert words[-1] == "finetune-suite[gguf]"
        assert words[:-1] == (
            ["uv", "pip", "install", "--python", str(python)] if by == "uv" else [str(python), "-m", "pip", "install"]
        )
        dry = ["--dry-run", "--no-deps", "--no-index", str(wheel)]
        tried = subprocess.run([*words[:-1], *dry], cwd=folder, capture_output=True, text=True, timeout=120)
        assert tried.returncode == 0, tried.stderr
        assert "ould install" in tried.stdout + tried.stderr


def test_hints_to_install_have_one_place() -> None:
    """No file of the program but one spells such a line; beside it are two about environments that are not ours."""
    spelt = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "src").rglob("*.py")
        if re.search(r"pip install|finetune-suite\[", path.read_text(encoding="utf-8"))
    }
    assert spelt == {
        "src/finetune/errors.py",
        "src/finetune/backends/mlx/blas.py",
        "src/finetune/verify/subjects/choose.py",
    }


def test_wheel_judges_a_trainer_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """The installed `ft verify` and pytest plugin hold a trainer to a law where there is no source tree."""
    law = ["--subject", "reference", "--law", "mask.answers"]
    (tmp_path / "empty").mkdir()
    for command, told in (
        ([str(installed / "bin" / "ft"), "verify", "--tier", "1", *law], "1 passed;"),
        (["-m", "pytest", "--finetune-subject=reference", "-k", "mask.answers", "-p", "no:cacheprovider"], "1 passed"),
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "empty",
            env=environment(installed),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert told in done.stdout
