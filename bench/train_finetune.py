"""FineTune on the benchmark's job."""

import time
from functools import partial

import job

from finetune.assembly.record import peak_rss
from finetune.backends import open_backend
from finetune.events import StepDone
from finetune.records import AdapterTarget, ModelLocation, Optimization, Tokenized
from finetune.tokens.batch import epoch_batches
from finetune.training.loop import LoopPlan, train


def main() -> None:
    asked = job.arguments()
    rows = [Tokenized(tuple(ids), (True,) * len(ids), f"row {index}") for index, ids in enumerate(job.rows())]
    session = open_backend("torch").open(ModelLocation("bench", asked.model, "local"), "float32", pad_id=0)
    session.attach(AdapterTarget(job.RANK, job.ALPHA, 0.0, job.MODULES), seed=0)
    session.prepare_updates(Optimization(weight_decay=0.0, max_grad_norm=1.0))
    plan = LoopPlan(asked.steps, 1, job.LEARNING_RATE, 0, "constant", asked.steps)

    def batches_of(epoch: int) -> list:
        return partial(epoch_batches, rows, job.BATCH_SIZE, seed=0)(epoch=epoch)

    started = time.perf_counter()
    steps = [event for event in train(session, batches_of, [], plan) if isinstance(event, StepDone)]
    seconds = time.perf_counter() - started
    tokens = sum(step.tokens for step in steps)
    job.tell("finetune", tokens, seconds, peak_rss() or 0, [step.loss for step in steps])


if __name__ == "__main__":
    main()
