"""mlx_lm.lora on a training job: its own `train_model`, with its own defaults for everything the job leaves open."""

import tempfile
import time
from types import SimpleNamespace

import job
from mlx_lm.lora import CONFIG_DEFAULTS, train_model
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.utils import load_model


class Rows:
    """Token ids as a data set of mlx-lm's: like the rows of its own, a row is a dict, by whose length it is sorted."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"text": self.rows[index]}

    def process(self, row: dict[str, list[int]]) -> tuple[list[int], int]:
        return row["text"], 0


class Clock(TrainingCallback):
    """Counts the tokens of each step; mlx-lm counts one token of padding a row, which stands for the row's first."""

    def __init__(self) -> None:
        self.tokens = 0
        self.losses: list[float] = []
        self.seconds = 0.0

    def on_train_loss_report(self, train_info: dict) -> None:
        self.tokens = int(train_info["trained_tokens"])
        self.losses.append(float(train_info["train_loss"]))
        self.seconds += 1 / train_info["iterations_per_second"]

    def on_val_loss_report(self, val_info: dict) -> None:
        raise NotImplementedError("no job evaluates")


def main() -> None:
    asked = job.arguments()
    task = job.JOBS[asked.job]
    model, _ = load_model(asked.model)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **CONFIG_DEFAULTS,
            "adapter_path": folder,
            "batch_size": task.batch_size,
            "iters": asked.steps,
            "steps_per_report": 1,
            "num_layers": -1,
            "optimizer": "adamw",
            "learning_rate": job.LEARNING_RATE,
            "max_seq_length": 1024,
            "model": str(asked.model),
            "lora_parameters": {"rank": job.RANK, "dropout": 0.0, "scale": job.ALPHA / job.RANK},
        }
        clock = Clock()
        started = time.perf_counter()
        train_model(SimpleNamespace(**settings), model, Rows(task.rows()), [], clock)
        seconds = time.perf_counter() - started
    job.tell(asked.name, clock.tokens, min(seconds, clock.seconds), job.peak_rss(), clock.losses)


if __name__ == "__main__":
    main()
