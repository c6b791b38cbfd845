"""Laws of subjects to other people's trainers: each in its own environment, which `make peers` makes."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.numpy import save_file

from finetune.chat.catalog import CATALOG
from finetune.errors import MissingExtraError, UsageError
from finetune.verify.client import SubjectClient
from finetune.verify.judge import Effort, judge
from finetune.verify.laws.protocol import conform
from finetune.verify.run import chosen_laws
from finetune.verify.subjects import choose
from finetune.verify.subjects.choose import running_subject
from finetune.verify.subjects.command import CommandSubject
from finetune.verify.subjects.command_file import CommandFile
from finetune.verify.subjects.process import reference_oracle
from finetune.verify.subjects.subject import RefusesError, Subject, SubjectError, UnsupportedError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = {"trl": "trl", "trainer": "trl", "mlx-lm": "mlx-lm"}
FOUND_IN_MLX_LM = {
    "padding.no_target": 1,
    "rows.remarks": 3,
    "model.rope_spelling": 0,
    "gradient.oracle": 0,
    "resume.same": 1,
}
"""What mlx-lm 0.32.2 does otherwise, with the rows of the smallest case."""


def python_of(peer: str) -> str:
    """The interpreter of a peer's environment."""
    python = ROOT / ".peers" / ENVIRONMENTS[peer] / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{peer}'s environment is not here: make peers")
    return str(python)


@pytest.mark.skipif(
    settings.get_current_profile_name().startswith("fast"),
    reason="takes a minute: HYPOTHESIS_PROFILE=ci has time for it",
)
@pytest.mark.parametrize("peer", ENVIRONMENTS)
def test_peers_are_what_the_protocol_says(peer: str, tmp_path: Path) -> None:
    """Every ability that a peer's subject claims is answered as the protocol says; nothing of it is left."""
    python = python_of(peer)

    @contextmanager
    def opened(folder: Path) -> Iterator[Subject]:
        with running_subject(peer, folder, python=python) as subject:
            yield subject

    judged = {each.law: each for each in conform(opened, tmp_path)}
    assert len(judged) >= 19
    assert {law: each for law, each in judged.items() if each.outcome != "passed"} == {}


def test_peers_findings_are_found_again_and_small(tmp_path: Path) -> None:
    """Five things that mlx-lm does otherwise come out of laws that know nothing of it, in three rows at most."""
    laws = {law.id: law for law in chosen_laws(2, FOUND_IN_MLX_LM)}
    oracle = reference_oracle(tmp_path / "oracle")
    try:
        with running_subject("mlx-lm", tmp_path, python=python_of("mlx-lm")) as subject:
            if subject.about.versions["mlx-lm"] != "0.32.2":
                pytest.skip(f"pinned for mlx-lm 0.32.2, and this is {subject.about.versions['mlx-lm']}")
            trainer = SubjectClient(subject, tmp_path, oracle)
            for law, rows in FOUND_IN_MLX_LM.items():
                judgement = judge(laws[law], trainer, Effort())
                assert judgement.outcome == "failed", judgement
                assert judgement.case is not None
                assert len(judgement.case.get("rows", ())) == rows, judgement
    finally:
        oracle.close()


def test_interpreter_named_from_here_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path from here is made one that holds in the folder that a trainer lives in; a bare name is looked up."""
    monkeypatch.chdir(tmp_path)
    assert choose._interpreter("trl-env/bin/python") == str(tmp_path / "trl-env" / "bin" / "python")
    assert choose._interpreter("python3") == "python3"


def test_peers_that_are_not_installed_are_refused_with_the_way_to_get_them(tmp_path: Path) -> None:
    """An interpreter without the peer, one that is none, and a name that is none are each refused by name."""
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    empty.chmod(0o755)
    with pytest.raises(MissingExtraError, match="trl") as caught, running_subject("trl", tmp_path, python=str(empty)):
        pass
    assert "pip install" in str(caught.value)
    assert "FT_SUBJECT_PYTHON" in str(caught.value)
    for name, python in (("trl", str(tmp_path / "nobody")), ("trll", None), ("json:JSONDecoder", None)):
        with pytest.raises(UsageError), running_subject(name, tmp_path, python=python):
            pass


COMMAND = """
import json, shutil, sys, time
from pathlib import Path
way, adapter, output, rate, begin = sys.argv[1:]
if way == "refuses": sys.exit("I will not")
if way == "crashes": raise SystemExit(70)
if way == "hangs": time.sleep(3600)
for step in range(int(begin) + 1, 4):
    print(f"step {step}: loss {1 / step} at {rate}")
    place = Path(output) / f"checkpoint-{step}"
    shutil.copytree(adapter, place)
shutil.copytree(adapter, Path(output) / "adapter")
"""


def command(tmp_path: Path, way: str, seconds: float = 120) -> CommandSubject:
    """The subject to a command that trains nothing, and writes what it is given."""
    adapter = tmp_path / "given"
    adapter.mkdir()
    save_file({"a": np.ones((1, 2), np.float32)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    script = tmp_path / "it.py"
    script.write_text(COMMAND)
    words = ["{python}", str(script), way, str(adapter), "{output}", "{settings.training.learning_rate}"]
    file = CommandFile.model_validate(
        {
            "name": "it",
            "adapter": "adapter",
            "checkpoints": "checkpoint-(?P<step>[0-9]+)",
            "told": {"line": r"step (?P<step>\d+): loss (?P<loss>\S+) at (?P<learning_rate>\S+)"},
            "settings": {"training.learning_rate": 0.5, "training.max_steps": 3},
            "refuses": [1],
            "train": {"argv": [*words, "0"], "seconds": seconds},
            "resume": {"argv": [*words, "1"]},
        }
    )
    place = tmp_path / "place"
    place.mkdir()
    return CommandSubject(file, place)


def test_command_tells_its_course_and_goes_on_from_what_it_had(tmp_path: Path) -> None:
    """Steps, rates, checkpoints and the adapter are read off; a run that is stopped leaves what there was by then."""
    subject = command(tmp_path, "trains")
    given = {"model": "m", "settings": {"training.learning_rate": 0.25}, "rows": [{"prompt": "a", "completion": "b"}]}
    whole = subject.ask("train", {**given, "folder": str(tmp_path / "whole")})
    assert [(step["step"], step["learning_rate"]) for step in whole["steps"]] == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert subject.ask("adapter_weights", {"model": "m", "adapter": whole["adapter"]})["scale"] == 3.0
    stopped = subject.ask("train", {**given, "folder": str(tmp_path / "part"), "stop_after": 1})
    assert (len(stopped["steps"]), stopped["adapter"], list(stopped["checkpoints"])) == (1, None, ["1"])
    rest = subject.ask("resume", {"folder": str(tmp_path / "part")})
    assert [step["step"] for step in rest["steps"]] == [2, 3]
    assert sorted(rest["checkpoints"]) == ["1", "2", "3"]
    with pytest.raises(UnsupportedError, match=r"training\.seed: 7: the command has no place"):
        subject.ask("train", {**given, "settings": {"training.seed": 7}, "folder": str(tmp_path / "other")})
    with pytest.raises(UnsupportedError, match="loss"):
        subject.ask("loss", {})


@pytest.mark.parametrize(
    ("way", "kind", "words"),
    [
        ("refuses", RefusesError, "I will not"),
        ("crashes", SubjectError, "ended with code 70"),
        ("hangs", SubjectError, "did not end within 3 s"),
    ],
)
def test_command_that_fails_is_told_as_it_is(way: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    """A command that refuses, crashes or hangs is each told apart, in bounded time."""
    subject = command(tmp_path, way, seconds=3 if way == "hangs" else 120)
    with pytest.raises(kind, match=words):
        subject.ask("train", {"model": "m", "settings": {}, "rows": [], "folder": str(tmp_path / "run")})


def test_trl_door_marks_answers_and_changes_no_text() -> None:
    """The turn that TRL's subject looks for stands in our template, and with its marks it says the same."""
    source = (Path(choose.__file__).parents[1] / "trainers" / "trl_sft.py").read_text(encoding="utf-8")
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    own = CATALOG["chatml"].jinja
    marked = own.replace(values["_TURN"], values["_MARKED_TURN"])
    mark = re.compile(r"\{%- (?:end)?generation -%\}")
    assert len(mark.findall(marked)) == 2
    messages = [
        {"role": role, "content": f" {role}\n"} for role in ("system", "user", "assistant", "user", "assistant")
    ]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for turns, prompt in ((messages, False), (messages[:-1], True)):
        one, other = (
            environment.from_string(text).render(messages=turns, add_generation_prompt=prompt)
            for text in (own, mark.sub("", marked))
        )
        assert one == other
