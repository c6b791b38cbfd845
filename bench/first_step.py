"""How long `ft train` takes to its first step, from nothing, and importing the frameworks alone, in seconds."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune.run.checkpoints import CheckpointStore

FRAMEWORKS = {"torch": "import torch, transformers, peft", "mlx": "import mlx.core, mlx_lm"}


def import_alone(backend: str) -> float:
    """A process that imports the frameworks and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", FRAMEWORKS[backend]], check=True)
    return time.perf_counter() - started


def first_step(backend: str) -> float:
    """A process of `ft train`, until the checkpoint of its first step is there."""
    with tempfile.TemporaryDirectory() as folder:
        program = "from finetune.cli import main; main()"
        arguments = ["train", "--backend", backend, "--set", "training.save_every=1", "--output", f"{folder}/run"]
        started = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        store = CheckpointStore(Path(folder) / "run" / "checkpoints")
        while not store.steps():
            if child.poll() is not None:
                sys.exit(f"ft train ended before its first step, with {child.returncode}")
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        child.kill()
        child.wait()
    return seconds


if __name__ == "__main__":
    print(json.dumps({"import": import_alone(sys.argv[1]), "first step": first_step(sys.argv[1])}))
