"""One call of `mlx_lm.lora`'s main function: settings and rows in files of its own formats, and what it tells."""

import ctypes
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# On Linux MLX brings a slow BLAS; the first library in the process to offer a name wins.
with suppress(OSError):
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

import mlx.core as mx
import yaml
from mlx_lm import lora
from mlx_lm.tuner.trainer import default_loss, iterate_batches
from mlx_lm.utils import load_tokenizer
from peer import LACKS, Answer, Given, adapter_kind, require_neutral, with_own_template
from serving import RefusesError, UnsupportedError

Wrapped = Callable[..., Any]
_PLAIN = {"training.batch_size": "batch_size", "training.seed": "seed", "tokens.max_length": "max_seq_length"}
_BLOCK = {
    **{f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_READ_ELSEWHERE = (
    *("template.name", "evaluation.max_new_tokens", "adapter.kind", "adapter.rank", "adapter.alpha", "adapter.scaling"),
    *("adapter.dropout", "adapter.target_modules", "training.gradient_accumulation_steps", "training.epochs"),
    *("training.max_steps", "training.learning_rate", "training.schedule", "training.warmup_fraction"),
    *("training.weight_decay", "training.save_every"),
)
_NO_CLIPPING = 1e6
_LACKS: Mapping[str, tuple[Any, str]] = {
    **LACKS,
    "training.max_grad_norm": (None, "it does not clip gradients"),
    "adapter.rank_pattern": (None, "its adapter has one rank"),
    "adapter.alpha_pattern": (None, "its adapter has one scale"),
    "adapter.modules_to_save": (None, "it trains adapters only"),
    "model.dtype": ("float32", "it computes in what the model's files hold"),
}


class StoppedError(Exception):
    """Training ends here."""


class Ids:
    """Rows of ids, with the place at which each answer begins, in the form of mlx-lm's own data sets."""

    def __init__(self, rows: Sequence[Given]) -> None:
        self.rows = [(list(row["ids"]), _offset(row["targets"])) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        return self.rows[index]

    def process(self, row: tuple[list[int], int]) -> tuple[list[int], int]:
        """A row is what training takes already."""
        return row


def config_of(model: str, settings: Given, folder: str, rows: int) -> Answer:
    """Its configuration for these settings; a setting of a name that nobody knows is handed on to it as it is.

    It counts iterations, of one batch each, where we count steps and epochs.
    """
    tokenizer_of(model, settings)
    each = settings.get("training.gradient_accumulation_steps", 1)
    config: dict[str, Any] = {
        "model": model,
        "train": True,
        "adapter_path": folder,
        "num_layers": -1,
        "mask_prompt": True,
        "grad_accumulation_steps": each,
        "steps_per_report": each,
        "iters": lora.CONFIG_DEFAULTS["iters"],
    }
    for name, value in settings.items():
        if name in _PLAIN:
            config[_PLAIN[name]] = value
        elif name in _LACKS:
            if not (name == "training.max_grad_norm" and value is not None and value >= _NO_CLIPPING):
                require_neutral(name, value, _LACKS)
        elif name not in _READ_ELSEWHERE:
            config[name.rpartition(".")[2]] = value
    if settings.get("training.max_steps") is not None:
        config["iters"] = settings["training.max_steps"] * each
    elif "training.epochs" in settings:
        size = config.get("batch_size", lora.CONFIG_DEFAULTS["batch_size"])
        config["iters"] = math.ceil(settings["training.epochs"] * rows / size)
    if settings.get("training.save_every"):
        config["save_every"] = settings["training.save_every"] * each
    return config | _adapter(settings) | _optimizer(settings, config["iters"] // each)


def _adapter(settings: Given) -> Answer:
    kind, targets = adapter_kind(settings), settings.get("adapter.target_modules", "all-linear")
    default = lora.CONFIG_DEFAULTS["lora_parameters"]
    rank = settings.get("adapter.rank", default["rank"])
    by = math.sqrt(rank) if settings.get("adapter.scaling") == "rank_stabilized" else rank
    scale = settings["adapter.alpha"] / by if "adapter.alpha" in settings else default["scale"]
    own = {"rank": rank, "scale": scale, "dropout": settings.get("adapter.dropout", default["dropout"])}
    if targets != "all-linear":
        own["keys"] = [_BLOCK.get(name, name) for name in targets]
    return {"fine_tune_type": kind, "lora_parameters": own}


def _optimizer(settings: Given, updates: int) -> Answer:
    rate = settings.get("training.learning_rate", lora.CONFIG_DEFAULTS["learning_rate"])
    schedule = settings.get("training.schedule", "constant")
    warmup = round(settings.get("training.warmup_fraction", 0.0) * updates)
    own: dict[str, Any] = {"learning_rate": rate}
    if schedule != "constant" or warmup:
        left = max(1, updates - warmup)
        shapes = {
            "cosine": ("cosine_decay", [rate, left]),
            "linear": ("linear_schedule", [rate, 0.0, left]),
            "constant": ("linear_schedule", [rate, rate, left]),
        }
        if schedule not in shapes:
            raise UnsupportedError(f"training.schedule: {schedule!r}")
        name, given = shapes[schedule]
        own["lr_schedule"] = {"name": name, "arguments": given, "warmup": warmup}
    if decay := settings.get("training.weight_decay"):
        own |= {"optimizer": "adamw", "optimizer_config": {"adamw": {"weight_decay": decay}}}
    return own


def effective_of(config: Given) -> Answer:
    """What its command line takes this configuration for, by our names."""
    found: dict[str, Any] = {}
    with in_place(lora, "run", lambda args: found.update(vars(args))):
        _main(config)
    adapter = found["lora_parameters"]
    plain = {name: found[own] for name, own in _PLAIN.items()}
    return {
        **plain,
        "adapter.rank": adapter["rank"],
        "adapter.dropout": adapter["dropout"],
        "adapter.alpha": adapter["scale"] * adapter["rank"],
        "training.gradient_accumulation_steps": found["grad_accumulation_steps"],
        "training.learning_rate": found["learning_rate"],
    }


def trained(
    config: Given,
    rows: Sequence[Given],
    *,
    batches: Wrapped = iterate_batches,
    loss: Wrapped = default_loss,
    watch: Wrapped = lambda optimizer: None,
    ids: Ids | None = None,
) -> list[dict[str, Any]]:
    """Train, with its own batches and loss or what watches them; the steps that it tells of.

    Args:
        watch: is shown the optimizer before training begins.
        ids: rows in the place of those that it would read.
    """
    steps: list[dict[str, Any]] = []
    right = lora.train

    def watched(*, optimizer: object, training_callback: object, **given: object) -> None:
        watch(optimizer)
        recorder = _LossRecorder(steps, config["grad_accumulation_steps"])
        right(optimizer=optimizer, training_callback=recorder, loss=loss, iterate_batches=batches, **given)

    whole = {**config, "data": _data(rows, "train"), "mask_prompt": _masks(rows)}
    with suppress(StoppedError), in_place(lora, "train", watched), _read(ids, 0):
        _main(whole)
    return steps


def evaluated(
    model: str, settings: Given, adapter: str | None, rows: Sequence[Given] = (), ids: Ids | None = None
) -> Answer:
    """The loss of a test set, with an adapter where one is given."""
    losses: list[float] = []
    right = lora.evaluate

    def watched(**given: object) -> float:
        losses.append(right(**given))
        return losses[-1]

    config = config_of(model, settings, adapter or "", rows=1)
    config |= {"train": False, "test": True, "test_batches": -1}
    config |= {"data": _data(rows, "test"), "mask_prompt": _masks(rows)}
    with in_place(lora, "evaluate", watched), _read(ids, 2):
        _main(config)
    return {"loss": losses[0]}


class _LossRecorder:
    """Keeps what training tells; it has the methods of a callback of mlx-lm's."""

    def __init__(self, steps: list[dict[str, Any]], each: int) -> None:
        self.steps, self.each = steps, each

    def on_train_loss_report(self, train_info: Given) -> None:
        step = math.ceil(train_info["iteration"] / self.each)
        self.steps.append(
            {"step": step, "loss": train_info["train_loss"], "learning_rate": train_info["learning_rate"]}
        )

    def on_val_loss_report(self, val_info: Given) -> None:
        """There are no held-out rows."""


def micro_of(batch: Any, spans: Any) -> Answer:
    """A batch as the model gets it; what its own loss does not depend on is no target of it."""
    inputs = batch[:, :-1]
    size = int(batch.max().item()) + 1

    def of(logits: object) -> Any:
        return default_loss(lambda _: logits, batch, spans)[0]

    pull = mx.abs(mx.grad(of)(mx.zeros((*inputs.shape, size)))).sum(axis=-1)
    # Where nothing at all counts, its loss is no number, and nor is its gradient.
    counted = [[False, *row] for row in (pull > 0).tolist()]
    ends = spans[:, 1].tolist()
    real = [[place < end for place in range(batch.shape[1])] for end in ends]
    return {"ids": batch.tolist(), "targets": counted, "real": real}


def no_loss(network: object, batch: object, spans: object) -> tuple[Any, Any]:
    """In the place of its loss where only batches are looked at."""
    return mx.array(0.0), mx.array(1)


def in_peft(name: str) -> str:
    """What PEFT's files call an adapter's weight."""
    path, _, kind = name.rpartition(".")
    known = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    return f"base_model.model.{path}.{known.get(kind, kind)}"


def tokenizer_of(model: str, settings: Given) -> Any:
    """Its tokenizer, where its template is the one that is asked for."""
    return with_own_template(load_tokenizer(Path(model)), settings)


def new_folder() -> str:
    """A new empty folder."""
    return tempfile.mkdtemp(dir=Path.cwd())


@contextmanager
def in_place(owner: object, name: str, other: object) -> Iterator[None]:
    """Something else in the place of what a module or class has."""
    right = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, right)


@contextmanager
def arguments(*words: str) -> Iterator[None]:
    """A command line; what it refuses in its own words is a refusal.

    Raises:
        RefusesError: as it said.
    """
    with in_place(sys, "argv", list(words)):
        try:
            yield
        except (ValueError, KeyError, SystemExit) as error:
            raise RefusesError(f"{type(error).__name__}: {error}") from error


def _main(config: Given) -> None:
    file = Path(new_folder()) / "lora_config.yaml"
    file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    with arguments("mlx_lm.lora", "--config", str(file)):
        lora.main()


@contextmanager
def _read(ids: Ids | None, place: int) -> Iterator[None]:
    sets: list[Any] = [[], [], []]
    sets[place] = ids
    with in_place(lora, "load_dataset", lora.load_dataset if ids is None else lambda *_: sets):
        yield


def _data(rows: Sequence[Given], name: str) -> str:
    folder = new_folder()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(folder) / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _masks(rows: Sequence[Given]) -> bool:
    return not any("text" in row for row in rows)


def _offset(targets: Sequence[bool]) -> int:
    # A row of which nothing is learned is to it one whose prompt is all of it.
    first = list(targets).index(True) if any(targets) else len(targets)
    if not all(targets[first:]):
        raise UnsupportedError("its loss counts the end of a row, from one place on")
    return first
