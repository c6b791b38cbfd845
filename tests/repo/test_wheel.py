"""Laws of the wheel: what others install holds the program, its models and the strategies, and works anywhere."""

import os
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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree, built without the network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = folder.glob("*.whl")
    return found


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
    for arguments, told in ((["--help"], "train"), (["check", "--set", "backend=reference"], "no problems")):
        command = [sys.executable, str(installed / "bin" / "ft"), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(installed), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    assert list(tmp_path.iterdir()) == []


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
