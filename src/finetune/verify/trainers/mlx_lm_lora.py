"""mlx-lm's LoRA trainer as a subject, through its own command line: run by an interpreter that has mlx-lm.

Each question becomes a configuration file and a call of `mlx_lm.lora`'s main function. What is asked for is read off
on the way, at what that hands to its own `train`: the batches, the loss, the optimizer.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx.utils import tree_flatten
from mlx_lm import fuse, lora
from mlx_lm.generate import stream_generate
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.utils import load
from mlx_lm_run import (
    Ids,
    StoppedError,
    arguments,
    config_of,
    effective_of,
    evaluated,
    in_peft,
    in_place,
    micro_of,
    new_folder,
    no_loss,
    tokenizer_of,
    trained,
)
from peer import (
    MISSING,
    Answer,
    Given,
    Prompts,
    prompt_ids,
    read_request,
    rendered,
    require_texts,
    without_end,
    write_request,
)
from serving import RefusesError, UnsupportedError, guarded, serve


def configure(model: str, settings: Given) -> Answer:
    """What its command line makes of a configuration file."""
    tokenizer_of(model, settings)
    return {"told": "", "effective": effective_of(config_of(model, settings, "adapters", rows=1))}


def render(model: str, settings: Given, messages: Sequence[Given], *, prompt: bool) -> Answer:
    """What the tokenizer's own template makes of a conversation."""
    found: dict[str, Any] = rendered(tokenizer_of(model, settings), messages, prompt=prompt)
    return found


def prompt(model: str, settings: Given, messages: Sequence[Given]) -> Answer:
    """The ids of what the tokenizer's own template makes of a question."""
    found: dict[str, Any] = prompt_ids(tokenizer_of(model, settings), messages)
    return found


def stops(model: str, settings: Given) -> Answer:
    """What ends an answer when it generates."""
    _, tokenizer = load(model)
    return {"ids": sorted(tokenizer.eos_token_ids)}


def tokenize(model: str, settings: Given, rows: Sequence[Given]) -> Answer:
    """Rows as they leave its iterator one by one; its loss says which tokens count."""
    require_texts(rows)
    if any("chat_template_kwargs" in row for row in rows):
        raise UnsupportedError("its rows set no variables of a template")
    found: list[dict[str, Any]] = []
    indices: list[int] = []
    right = CacheDataset.__getitem__

    def noted(self: object, index: int) -> Any:
        indices.append(index)
        return right(self, index)

    def watched(*given: object, **named: object) -> Iterator[Any]:
        for batch, spans in iterate_batches(*given, **{**named, "loop": False}):
            micro = micro_of(batch, spans)
            count = sum(micro["real"][0])
            row = {"row": indices[-1], "ids": micro["ids"][0][:count], "targets": micro["targets"][0][:count]}
            found.append(row)
            yield batch, spans

    config = config_of(
        model,
        {**settings, "training.batch_size": 1, "training.gradient_accumulation_steps": 1},
        new_folder(),
        rows=len(rows),
    )
    config["iters"] = len(rows) + 1
    with in_place(CacheDataset, "__getitem__", noted):
        try:
            trained(config, rows, batches=watched, loss=no_loss)
        except TemplateError as error:
            raise UnsupportedError(f"a row that its template refuses ends its preparation: {error}") from error
    return {"rows": sorted(found, key=lambda row: row["row"])}


def batches(model: str, settings: Given, rows: Sequence[Given], epochs: int) -> Answer:
    """What its iterator gives to training; each of its shuffles begins an epoch."""
    seen: list[list[dict[str, Any]]] = []
    shuffle = lora.np.random.permutation

    def shuffled(count: int) -> Any:
        if len(seen) == epochs:
            raise StoppedError
        seen.append([])
        return shuffle(count)

    def watched(*given: object, **named: object) -> Iterator[Any]:
        for batch, spans in iterate_batches(*given, **named):
            seen[-1].append(micro_of(batch, spans))
            yield batch, spans

    config = config_of(model, {**settings, "training.max_steps": 1_000_000}, new_folder(), rows=len(rows))
    with in_place(lora.np.random, "permutation", shuffled):
        trained(config, rows, batches=watched, loss=no_loss)
    each = config["grad_accumulation_steps"]
    if any(len(micro) % each for micro in seen):
        raise UnsupportedError("its steps go on from one epoch into the next, and no epoch has steps of its own")
    steps = [[{"micro": micro[start : start + each]} for start in range(0, len(micro), each)] for micro in seen]
    return {"epochs": steps}


def loss(model: str, settings: Given, batch: Sequence[Given], adapter: str | None = None) -> Answer:
    """What it evaluates one batch to."""
    found: dict[str, Any] = evaluated(model, {**settings, "training.batch_size": len(batch)}, adapter, ids=Ids(batch))
    return found


def evaluate(model: str, settings: Given, rows: Sequence[Given], adapter: str | None = None) -> Answer:
    """What it evaluates rows to, as a test set."""
    found: dict[str, Any] = evaluated(model, settings, adapter, rows=rows)
    return found


def gradient(model: str, settings: Given, micro: Sequence[Sequence[Given]]) -> Answer:
    """The gradient that its optimizer is given in its first step, where its iterator yields these micro-batches."""
    found: dict[str, Any] = {}

    def given_ones(dataset: object, batch_size: int, max_seq_length: int, **_: object) -> Iterator[Any]:
        for rows in micro:
            yield from iterate_batches(Ids(rows), len(rows), max_seq_length)

    def watch(optimizer: Any) -> None:
        move = optimizer.update

        def update(network: object, gradients: object) -> None:
            found["norms"] = {in_peft(name): mx.linalg.norm(tensor).item() for name, tensor in tree_flatten(gradients)}
            move(network, gradients)

        optimizer.update = update

    given = {
        **settings,
        "training.gradient_accumulation_steps": len(micro),
        "training.max_steps": 1,
        "training.batch_size": 1,
    }
    config = config_of(model, given, new_folder(), rows=1)
    # A compiled step shows no numbers on the way.
    mx.disable_compile()
    try:
        steps = trained(config, [], batches=given_ones, watch=watch, ids=Ids(micro[0]))
    finally:
        mx.enable_compile()
    return {**found, "loss": steps[0]["loss"]}


def train(model: str, settings: Given, rows: Sequence[Given], folder: str, stop_after: int | None = None) -> Answer:
    """A run; with `stop_after` it ends when it asks for the first batch after that step."""
    return _course(write_request(folder, model, settings, rows), Path(folder), stop_after, done=0)


def resume(folder: str, stop_after: int | None = None, settings: Given | None = None) -> Answer:
    """Go on from the newest weights, as its manual says: with `resume_adapter_file`, and the iterations that remain."""
    place, request = Path(folder), read_request(folder, settings)
    done = max((int(step) for step in _checkpoints(place, request["settings"])), default=0)
    if not done:
        raise RefusesError("there are no weights to go on from")
    return _course(request, place, stop_after, done=done)


def initial_adapter(model: str, settings: Given) -> Answer:
    """What it saves when there is nothing to train."""
    folder = new_folder()
    trained({**config_of(model, settings, folder, rows=1), "iters": 0}, [{"prompt": "a", "completion": "b"}])
    return adapter_weights(model, folder)


def adapter_weights(model: str, adapter: str) -> Answer:
    """An adapter of its own format by the names and in the form of PEFT."""
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    weights = mx.load(str(Path(adapter) / "adapters.safetensors"))
    if others := [name for name in weights if not name.endswith((".lora_a", ".lora_b"))]:
        raise UnsupportedError(f"{others[0]}: what its DoRA saves has no form in PEFT's files that this subject knows")
    found = {in_peft(name): mx.contiguous(tensor.T.astype(mx.float32)) for name, tensor in weights.items()}
    file = str(Path(new_folder()) / "adapter.safetensors")
    mx.save_safetensors(file, found)
    return {"file": file, "scale": config["lora_parameters"]["scale"]}


def logits(model: str, settings: Given, prompts: Prompts, adapter: str | None = None) -> Answer:
    """What the model computes, with an adapter where one is given."""
    network, _ = load(model, adapter_path=adapter)
    found = {str(place): network(mx.array([list(ids)]))[0].astype(mx.float32) for place, ids in enumerate(prompts)}
    file = str(Path(new_folder()) / "logits.safetensors")
    mx.save_safetensors(file, found)
    return {"file": file}


def generate(model: str, settings: Given, prompts: Prompts, adapter: str | None = None) -> Answer:
    """What it generates greedily, one prompt after the other."""
    network, tokenizer = load(model, adapter_path=adapter)
    most = settings.get("evaluation.max_new_tokens", 32)
    answers = []
    for ids in prompts:
        generated = [part.token for part in stream_generate(network, tokenizer, list(ids), max_tokens=most)]
        answers.append(without_end(generated, tokenizer.eos_token_ids))
    return {"answers": answers}


def merge(model: str, settings: Given, adapter: str) -> Answer:
    """Its own command for that."""
    folder = new_folder()
    with arguments("mlx_lm.fuse", "--model", model, "--adapter-path", adapter, "--save-path", folder):
        fuse.main()
    return {"folder": folder}


def _course(request: Given, place: Path, stop_after: int | None, *, done: int) -> Answer:
    """A run of what remains after so many steps."""
    settings, adapters = request["settings"], place / "adapters"
    config = config_of(request["model"], settings, str(adapters), rows=len(request["rows"]))
    each = config["grad_accumulation_steps"]
    if done:
        config["resume_adapter_file"] = str(adapters / f"{done * each:07d}_adapters.safetensors")
        config["iters"] -= done * each
    ended = False

    def until(*given: object, **named: object) -> Iterator[Any]:
        nonlocal ended
        for count, batch in enumerate(iterate_batches(*given, **named)):
            if stop_after is not None and count == (stop_after - done) * each:
                ended = True
                raise StoppedError
            yield batch

    steps = trained(config, request["rows"], batches=until)
    adapter = None if ended else str(adapters)
    return {"steps": steps, "adapter": adapter, "checkpoints": _checkpoints(place, settings)}


def _checkpoints(place: Path, settings: Given) -> dict[str, str]:
    each = settings.get("training.gradient_accumulation_steps", 1)
    files = (place / "adapters").glob("*_adapters.safetensors")
    return {str(int(file.name.partition("_")[0]) // each): str(file) for file in files}


def main() -> None:
    """Answer questions."""
    can: tuple[Callable[..., Any], ...] = (
        configure,
        render,
        prompt,
        stops,
        tokenize,
        batches,
        loss,
        gradient,
        train,
        resume,
        evaluate,
    )
    can += (initial_adapter, adapter_weights, logits, generate, merge)
    handlers = {handler.__name__: handler for handler in can}
    missing = {**MISSING, "export": "its GGUF files hold merged models of 16 bits only, from `mlx_lm.fuse`"}
    versions = {package: version(package) for package in ("mlx-lm", "mlx", "transformers")}
    serve("mlx_lm.lora", versions, guarded(handlers, str(Path(__file__).parent)), missing=missing)


if __name__ == "__main__":
    main()
