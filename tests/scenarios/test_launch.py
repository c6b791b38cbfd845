"""Runs of two real processes, started by the launchers that people have: one run, killed, interrupted, resumed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from support.processes import MAIN, ft, settings

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("accelerate", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytestmark = pytest.mark.tier2

ADAPTER = "adapter/adapter_model.safetensors"
QUICK = settings(
    {
        "judge.control": "never",
        "judge.memory": "never",
        "training.max_steps": 5,
        "training.save_every": 2,
        "training.evaluate_every": 2,
        "data.valid_fraction": 0.1,
        "training.max_grad_norm": 0.5,
        "evaluation.questions": 2,
        "evaluation.retention_questions": 2,
    }
)
PLANTED = """
import os
if os.environ.get("RANK", os.environ.get("MLX_RANK")) == os.environ["DIES"]:
    import signal
    from finetune.distributed import data_parallel as team
    accumulate = team._DataParallelSession.accumulate
    def accumulate_or_die(self, *given):
        if self._step == 3:
            os.kill(os.getpid(), int(os.environ["BY"]))
        return accumulate(self, *given)
    team._DataParallelSession.accumulate = accumulate_or_die
"""
"""Read by every process as it starts; only that of the given rank dies, in the middle of its fourth step."""


def dying(folder: Path, rank: int, sign: int) -> dict[str, str]:
    """What must be in the environment for one process to die."""
    (folder / "planted").mkdir()
    (folder / "planted" / "sitecustomize.py").write_text(PLANTED)
    path = os.pathsep.join([str(folder / "planted"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "DIES": str(rank), "BY": str(int(sign))}


def steps(run: Path) -> list[dict[str, Any]]:
    """What the run's log tells of its steps and held-out losses, without what a clock says, and checks of that."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    timed = ("seconds", "rss", "tokens_per_second", "check")
    told = [event for event in events if event["event"] in ("StepDone", "HeldOutLoss")]
    return [{key: value for key, value in event.items() if key not in timed} for event in told]


def assert_same_training(run: Path, other: Path) -> None:
    """The same steps, up to float32's rounding of a sum of two, and no more."""
    assert len(steps(run)) == len(steps(other)) == 9
    for mine, theirs in zip(steps(run), steps(other), strict=True):
        assert mine.pop("event") == theirs.pop("event")
        assert mine == pytest.approx(theirs, rel=1e-4)
    tensors, others = load_file(run / ADAPTER), load_file(other / ADAPTER)
    largest = max(float(np.abs(tensor).max()) for tensor in tensors.values())
    for name, tensor in tensors.items():
        np.testing.assert_allclose(others[name], tensor, atol=1e-3 * largest, err_msg=name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are."""
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """One process, eight rows at once."""
    done = ft("train", *QUICK, "--set", "training.batch_size=8", "--output", "alone", cwd=place)
    assert done.returncode in (0, 1, 4), done.stderr
    return place / "alone"


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """Two processes started by torchrun itself, four rows each; what they say is kept."""
    (place / "ft.py").write_text(MAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ft.py"]
    own = ["train", *QUICK, "--set", "training.batch_size=4", "--output", "two", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *own], cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    (place / "two.out").write_text(done.stdout)
    (place / "two.err").write_text(done.stderr)
    assert (place / "two" / "run.json").exists(), done.stderr
    return place / "two"


def test_two_processes_are_one_with_twice_the_batch(alone: Path, two: Path, place: Path) -> None:
    """torchrun: losses, norms, counts and adapter of two processes are those of one; only the first of them speaks."""
    assert_same_training(alone, two)
    told = json.loads((place / "two.out").read_text())
    assert told["status"] == "complete"
    plan = {entry["key"]: (entry["value"], entry["origin"]) for entry in told["plan"]}
    assert plan["training.processes"] == (2, "derived")
    assert (place / "two.err").read_text().count("step 5/5") == 1


def test_accelerate_starts_the_same_run(two: Path, place: Path) -> None:
    """`ft train --launch accelerate` ends in the bytes of the run that torchrun started; the report is printed once."""
    chosen = [*QUICK, "--set", "training.batch_size=4"]
    done = ft("train", *chosen, "--launch", "accelerate", "--processes", "2", "--output", "a", "--json", cwd=place)
    run = json.loads(done.stdout)
    assert (run["folder"], {"passed": 0, "failed": 1}.get(run["outcome"], 4)) == ("a", done.returncode)
    assert run["command"].startswith("ft -c" if "-c" in run["command"].split()[:2] else "ft train")
    assert "--launch accelerate" in run["command"]
    assert (place / "a" / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()
    assert steps(place / "a") == steps(two)


def test_fsdp_by_a_file_of_accelerates_own_changes_nothing(two: Path, place: Path) -> None:
    """With frozen weights shared among the processes a run ends in the same bytes, and is judged on whole weights."""
    (place / "fsdp.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 2\nnum_machines: 1\n"
        "mixed_precision: 'no'\nfsdp_config: {fsdp_version: 2, fsdp_cpu_ram_efficient_loading: true}\n"
    )
    chosen = [*QUICK, "--set", "training.batch_size=4", "--launch", "accelerate", "--launch-config", "fsdp.yaml"]
    done = ft("train", *chosen, "--output", "fsdp", "--json", cwd=place)
    assert done.stdout, done.stderr
    outcomes = {verdict["id"]: verdict["outcome"] for verdict in json.loads(done.stdout)["verdicts"]}
    assert outcomes["parameter-exactly"] == outcomes["artifacts-reload"] == "passed"
    assert (place / "fsdp" / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()
    assert steps(place / "fsdp") == steps(two)


SHARDED = """
from pathlib import Path
import torch, torch.distributed as dist
from finetune.backends.torch.backend import TorchBackend
from finetune.backends.torch.group import TorchGroup
from finetune.models.locate import locate_model
from finetune.records import AdapterTarget, Batch, Optimization, TokenizedRow
from finetune.distributed.data_parallel import data_parallel

backend = TorchBackend()
backend.join()
rows = tuple(TokenizedRow(tuple(range(9, 20 + n)), (True,) * (11 + n), str(n)) for n in range(3))
found = []
for group in (TorchGroup(sharded=False), TorchGroup(sharded=True)):
    session = backend.open(locate_model("reference-llama", revision=None), "float32", 0)
    session.attach(AdapterTarget(4, 8.0, 0.0, ("q_proj", "v_proj")), 0)
    session.prepare_updates(Optimization(0.0, 1.0))
    group.divide(session)
    frozen = [tensor for tensor in session.model.parameters() if not tensor.requires_grad]
    held = sum(getattr(tensor, "to_local", lambda: tensor)().numel() for tensor in frozen)
    team = data_parallel(session, group, shares=3, seed=0)
    # Three shares for two processes, and a batch of two rows: some process has nothing of its own to compute.
    losses = [team.accumulate(Batch(rows[:2]), 0.1), team.accumulate(Batch(rows), 0.1)]
    found.append((held, losses, [tensor.grad.clone() for tensor in session._trainable().values()]))
(whole, losses, gradients), (part, same_losses, same) = found
assert part < 0.65 * whole, (part, whole)
assert losses == same_losses
assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
Path(f"fine-{dist.get_rank()}").touch()
dist.destroy_process_group()
"""


def test_fsdp_holds_part_of_the_weights_and_finds_the_same_gradients(place: Path) -> None:
    """A process holds its share of the blocks' weights; gradients and losses are to the bit those of whole weights."""
    (place / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sharded.py"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200)
    assert {file.name for file in place.glob("fine-*")} == {"fine-0", "fine-1"}, done.stderr


def test_killed_rank_ends_the_run_clearly_and_it_goes_on_to_the_same_bytes(place: Path) -> None:
    """Told by rank, with an intact checkpoint and the command that ends in the same bytes."""
    chosen = [*QUICK, "--set", "training.batch_size=4", "--set", "adapter.dropout=0.2"]
    launch = ["--launch", "torchrun", "--processes", "2"]
    whole = ft("train", *chosen, *launch, "--output", "dropping", cwd=place)
    assert whole.returncode in (0, 1, 4), whole.stderr
    killed = ft("train", *chosen, *launch, "--output", "killed", cwd=place, **dying(place, 1, signal.SIGKILL))
    assert killed.returncode == 1, killed.stderr
    last = killed.stderr.split("error: ")[-1]
    assert last.startswith("rank 1 (process ")
    assert "the checkpoint of step 2 is intact" in last
    assert "Traceback" not in killed.stderr
    assert not (place / "killed" / "run.json").exists()
    shutil.copytree(place / "killed", place / "fewer")
    asked = last.split("go on with: ")[1].split("\n")[0]
    assert asked == "ft train --resume --launch torchrun --processes 2 --output killed"
    resumed = ft(*shlex.split(asked)[1:], cwd=place)
    assert resumed.returncode in (0, 1, 4), resumed.stderr
    assert "from step 2" in resumed.stderr
    assert (place / "killed" / ADAPTER).read_bytes() == (place / "dropping" / ADAPTER).read_bytes()
    assert steps(place / "killed") == steps(place / "dropping")
    # One process does the work of both, dropout and all.
    fewer = ft("train", "--resume", "--output", "fewer", cwd=place)
    assert fewer.returncode in (0, 1, 4), fewer.stderr
    assert_same_training(place / "fewer", place / "dropping")


def test_ctrl_c_ends_every_process_with_130(place: Path) -> None:
    """A signal to `ft train --launch` ends its processes; what is left, and how to go on, is told."""
    chosen = [*QUICK, "--set", "training.max_steps=5000", "--set", "training.batch_size=4"]
    launch = ["--launch", "torchrun", "--processes", "2", "--output", "stopped"]
    command = [sys.executable, "-c", MAIN, "train", *chosen, *launch]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    # Any of them: the first is gone again as soon as a few more have been written.
    while not any((place / "stopped" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    told = child.communicate(timeout=120)[1]
    assert child.returncode == 130, told
    assert "is intact" in told
    assert "go on with: ft train --resume --launch torchrun --processes 2 --output stopped" in told
    again = ft("train", "--resume", "--output", "stopped", "--processes", "2", cwd=place)
    assert (again.returncode, "--processes needs a launcher" in again.stderr) == (2, True)


def test_mlx_launch_starts_two_processes_that_are_one_with_twice_the_batch(place: Path) -> None:
    """mlx.launch: the same law over MLX's ring; and a killed rank is told of, though mlx.launch itself ends with 0."""
    mlx = pytest.importorskip("mlx.core", reason="needs the mlx extra: pip install 'finetune-suite[mlx]'")
    pytest.importorskip("mlx_lm", reason="needs the mlx extra: pip install 'finetune-suite[mlx]'")
    if not mlx.distributed.is_available("ring"):
        pytest.skip("needs a build of MLX with the ring of its distributed part: pip install mlx")
    chosen = [*QUICK, "--backend", "mlx"]
    one = ft("train", *chosen, "--set", "training.batch_size=8", "--output", "mlx-one", cwd=place)
    assert one.returncode in (0, 1, 4), one.stderr
    chosen += ["--set", "training.batch_size=4", "--launch", "mlx.launch", "--processes", "2"]
    both = ft("train", *chosen, "--output", "mlx-two", cwd=place)
    assert (place / "mlx-two" / "run.json").exists(), both.stderr
    assert_same_training(place / "mlx-one", place / "mlx-two")
    (place / "mlx").mkdir()
    killed = ft("train", *chosen, "--output", "mlx-killed", cwd=place, **dying(place / "mlx", 1, signal.SIGKILL))
    assert killed.returncode == 1, killed.stderr
    assert "error: rank 1 (process " in killed.stderr
    assert "the checkpoint of step 2 is intact" in killed.stderr


def test_refusal_of_the_processes_is_told_once_with_its_code(place: Path) -> None:
    """What each process refuses for itself reaches the user once, with exit code 3 and no word of the launcher's."""
    done = ft("train", "--model", "./nowhere", "--launch", "torchrun", "--processes", "2", "--output", "no", cwd=place)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("nowhere") <= 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not (place / "no").exists()
