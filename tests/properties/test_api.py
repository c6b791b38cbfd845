"""Fine-tuning from Python: one call, typed results, completion."""

import html
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import finetune
from finetune.api import FineTuned
from finetune.errors import ConfigError, UsageError
from finetune.records import Outcome, Verdict
from finetune.report import render_html

SMALL = {"backend": "reference", "rank": 2, "max_steps": 2, "judge__control": "never", "judge__memory": "never"}


@pytest.mark.slow
def test_train_from_python_gives_a_typed_result(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Model, rows and settings by their names go in; outcome, verdicts, report and adapter come out."""
    result = finetune.train(model=model, data=data, output=tmp_path / "run", **SMALL)
    assert isinstance(result, FineTuned)
    assert result.record["training"]["steps"] == 2
    assert isinstance(result.outcome, Outcome)
    assert result.passed == (result.outcome == Outcome.PASSED)
    assert all(isinstance(verdict, Verdict) for verdict in result.verdicts)
    assert len(result.verdicts) >= 10
    assert result.report.is_file()
    assert (result.adapter / "adapter_config.json").is_file()
    frame = r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts" style="[^"]*"></iframe>'
    [page] = re.findall(f"^{frame}$", result._repr_html_())
    assert html.unescape(page) == render_html([{**result.record, "folder": str(result.folder)}])
    plan = {item["key"]: item["value"] for item in result.record["plan"]}
    assert (plan["adapter.rank"], plan["training.max_steps"], plan["judge.control"]) == (2, 2, "never")
    assert "step 2/2" in capfd.readouterr().err


@pytest.mark.slow
def test_train_from_python_can_be_silent(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`progress=False` writes nothing anywhere but into the run."""
    finetune.train(model=model, data=data, output=tmp_path / "run", progress=False, **SMALL)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epochz": 3}, "training.epochs"),
        ({"epochs": "many"}, "training.epochs"),
        ({"training__sed": 1}, "did you mean training.seed?"),
        ({"lora_r": 4}, "adapter.rank"),
        ({"profile": "chatt"}, "did you mean chat?"),
    ],
)
def test_train_from_python_refuses_what_is_no_setting(settings: dict[str, object], told: str) -> None:
    """A misspelt name or a wrong value is refused with the nearest, as on the command line."""
    with pytest.raises(ConfigError, match=told.replace(".", r"\.").replace("?", r"\?")):
        finetune.train(progress=False, **settings)  # type: ignore[arg-type]


def test_setting_of_several_sections_needs_its_section() -> None:
    """A name that two sections have is refused with both."""
    from finetune.config import KEYS

    names = [key.partition(".")[2] for key in KEYS if "." in key]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is None:
        pytest.skip("no two sections have a setting of one name")
    with pytest.raises(UsageError, match="several sections"):
        finetune.train(**{double: 1})  # type: ignore[arg-type]


@pytest.mark.slow
def test_package_can_be_completed_and_loads_nothing_for_it() -> None:
    """`dir(finetune)` has every public name, each with a docstring; `finetune.train` is both module and function."""
    assert dir(finetune) == sorted(finetune.__all__)
    for name in finetune.__all__:
        assert name == "__version__" or inspect.getdoc(getattr(finetune, name)), name
    program = (
        "import sys, finetune; dir(finetune); heavy = {'numpy', 'torch', 'pydantic', 'yaml'} & set(sys.modules);"
        "import finetune.train; print(heavy, callable(finetune.train));"
        "from finetune import train; print(callable(train), callable(finetune.train.fine_tune))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set() True", "True True"]
    assert typing.get_type_hints(finetune.api.train)["return"] is FineTuned


def test_configuration_has_defaults() -> None:
    """`load_config()` needs nothing: no file, this process's environment, no profile."""
    assert finetune.load_config().config == finetune.load_config(None, environ=None, overrides={}, profile=None).config


def test_arguments_of_train_are_shown() -> None:
    """A notebook shows the arguments of `finetune.train` by their names, though it is a module, too."""
    shown = inspect.signature(finetune.train)
    assert shown == inspect.signature(sys.modules[FineTuned.__module__].train)
    assert {"model", "data", "output"} <= set(shown.parameters)
