"""FineTune on a training job, with torch or MLX; a checkpoint is written every ten steps, and timed by itself."""

import tempfile
import time
from functools import partial
from pathlib import Path

import job

from finetune.backends import open_backend
from finetune.data.batches import epoch_batches
from finetune.events import StepDone
from finetune.records import AdapterTarget, ModelLocation, Optimization, TokenizedRow
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune.training.loop import LoopPlan, train

SAVE_EVERY = 10


def main() -> None:
    asked = job.arguments()
    task, steps = job.JOBS[asked.job], asked.steps
    rows = [TokenizedRow(tuple(ids), (True,) * len(ids), f"row {index}") for index, ids in enumerate(task.rows())]
    session = open_backend(asked.backend).open(ModelLocation("bench", asked.model, "local"), "float32", pad_id=0)
    session.attach(AdapterTarget(job.RANK, job.ALPHA, 0.0, task.modules), seed=0)
    session.prepare_updates(Optimization(weight_decay=0.0, max_grad_norm=1.0))
    plan = LoopPlan(steps, 1, job.LEARNING_RATE, 0, "constant", steps)
    saving, done = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", keep=2)
        started = time.perf_counter()
        for event in train(session, partial(_batches, rows, task.batch_size), [], plan):
            if isinstance(event, StepDone):
                done.append(event)
                if event.step % SAVE_EVERY == 0:
                    save_started = time.perf_counter()
                    store.save(event.step, session.save_state, Owner({}, {}))
                    saving += time.perf_counter() - save_started
        seconds = time.perf_counter() - started - saving
    tokens = sum(step.tokens for step in done)
    job.tell(asked.name, tokens, seconds, job.peak_rss(), [step.loss for step in done], saving=saving)


def _batches(rows: list[TokenizedRow], size: int, epoch: int) -> list:
    return epoch_batches(rows, size, seed=0, epoch=epoch)


if __name__ == "__main__":
    main()
