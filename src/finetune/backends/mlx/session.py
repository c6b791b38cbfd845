"""A model in MLX: train, score, ask, save."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from finetune.adapters.choose import tables_with_rows
from finetune.adapters.peft_files import adapted_layers, check_tensor_shapes, frozen_name
from finetune.backends.mlx import state
from finetune.backends.mlx.adapter import read_adapter, write_adapter
from finetune.backends.mlx.forward import Arrays, Sizes, arrays_of, plan_forward
from finetune.backends.mlx.group import pool_gradients
from finetune.backends.mlx.layers import MlxAdapter, draw_tensors, layer_shapes, put_on, refuse_packed, weight_shapes
from finetune.backends.mlx.load import Loaded, write_config
from finetune.backends.mlx.optimizer import MlxAdamW, clip, norms
from finetune.backends.mlx.packed import in_float64, in_full, packed_layers
from finetune.backends.mlx.recompute import blocks_of, recomputed
from finetune.backends.mlx.tensors import fingerprint, first_line, write_tensors
from finetune.errors import ModelError, OutOfMemoryError, TrainingError
from finetune.models.travel import public_name
from finetune.objectives.cross_entropy import CROSS_ENTROPY
from finetune.ports import ChooseTokens, Group, Objective
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization

_EXHAUSTED = ("allocate", "memory", "Insufficient Memory")


class MlxSession:
    """One loaded model; implements `ports.Session` with MLX, with the tensor names of torch and PEFT.

    The model is always at rest: mlx-lm's models have no dropout of their own, so only the adapter's is applied.
    """

    def __init__(self, loaded: Loaded, location: ModelLocation, pad_id: int) -> None:
        self.loaded = loaded
        self.location = location
        # Padding is never seen; but an id beyond the table would be read from whatever memory lies there.
        sizes = Sizes(loaded.vocab_size, loaded.context, pad_id if 0 <= pad_id < loaded.vocab_size else 0)
        self.forward_pass = plan_forward(loaded.model, sizes)
        self._layers, self._shapes = layer_shapes(loaded), weight_shapes(loaded)
        self.adapter: MlxAdapter | None = None
        self.gradients: dict[str, mx.array] = {}
        self._key = mx.random.key(0)
        self._optimizer: MlxAdamW | None = None
        self._trained: dict[str, str] = {} if packed_layers(loaded.model) else self._places()

    @property
    def device(self) -> str:
        """Where the model computes: "cpu", or the GPU by its name."""
        gpu = mx.default_device() == mx.gpu
        return f"gpu ({mx.device_info().get('device_name', 'unnamed')})" if gpu else "cpu"

    def attach(self, target: AdapterTarget | None, seed: int) -> None:
        """Put a freshly initialised adapter on the model and freeze the rest; None makes every weight trainable.

        Raises:
            ModelError: a name in `target.modules` matches no linear layer, mlx-lm keeps one that it matches in another
                form than the model's files, or a module to train whole is quantised.
        """
        refuse_packed(self.loaded, target)
        if target is not None:
            target = replace(target, rows=tables_with_rows(self._shapes, target))
        drawing, self._key = mx.random.split(mx.random.key(seed))
        adapted_layers(self._layers, target.modules if target else ())
        self._take_off()
        if target is not None:
            self.adapter = put_on(self.loaded, target, draw_tensors(self.loaded, self._layers, target, drawing))
        self._trained = self.adapter.tensors(self.loaded.names) if self.adapter else self._places()

    def _take_off(self) -> None:
        if self.adapter is not None:
            self.adapter.take_off(self.loaded.model)
        self.adapter = None
        self.gradients = {}
        self._optimizer = None

    def prepare_updates(self, optimization: Optimization) -> None:
        """Make the optimizer for everything that is trainable."""
        if optimization.gradient_checkpointing:
            blocks_of(self.loaded.model)
        self._optimizer = MlxAdamW(self._trainable(), optimization)

    @property
    def optimizer(self) -> MlxAdamW:
        """The optimizer that `prepare_updates` made."""
        if self._optimizer is None:
            raise TrainingError("prepare_updates must come before the first update")
        return self._optimizer

    def accumulate(self, batch: Batch, weight: float, objective: Objective = CROSS_ENTROPY) -> float:
        """Add `weight` x (the objective's loss of the batch) to the gradients; returns that loss."""
        if not self._trained:
            raise TrainingError(
                "nothing is trainable: a loaded adapter and a quantised base are frozen", hint="attach a fresh adapter"
            )
        arrays = arrays_of(batch, self.forward_pass.sizes)
        if not arrays.targets.size:
            return 0.0
        self._key, key = mx.random.split(self._key)
        try:
            with self.adapter.learning(key) if self.adapter else contextlib.nullcontext():
                loss, gradients = self._slopes(arrays, weight, objective)
            before = self.gradients
            added = {name: before[name] + each if before else each for name, each in gradients.items()}
            # The one place where the graph of a batch is worked out: loss and gradients together.
            mx.eval(loss, added, self._key)
        except (RuntimeError, MemoryError) as error:
            raise _as_memory_error(error, batch) from error
        self.gradients = added
        return float(loss.item())

    def _slopes(self, arrays: Arrays, weight: float, objective: Objective) -> tuple[mx.array, dict[str, mx.array]]:
        """The objective's loss and, in float32, `weight` times its slope along each trainable tensor."""

        def scaled(weights: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
            self._put(weights)
            loss = self.forward_pass.loss(arrays, objective)
            return weight * loss, loss

        weights = self._trainable()
        again = self._optimizer is not None and self._optimizer.optimization.gradient_checkpointing
        try:
            with recomputed(self.loaded.model, self._trained.values()) if again else contextlib.nullcontext():
                (_, loss), gradients = mx.value_and_grad(scaled)(weights)
        finally:
            self._put(weights)
        return loss, {name: gradient.astype(mx.float32) for name, gradient in gradients.items()}

    def pool_gradients(self, group: Group) -> None:
        """Add up the gradients of all processes of a group: afterwards each has the sum."""
        self.gradients = pool_gradients(self._trainable(), self.gradients, group)

    def reseed(self, seed: int) -> None:
        """Draw the random numbers of training from this seed from now on."""
        self._key = mx.random.key(seed)

    def clip_gradients(self) -> float:
        """Clip all gradients together to the limit; returns their L2 norm before clipping."""
        self.gradients, norm = clip(self.gradients, self.optimizer.optimization.max_grad_norm)
        return norm

    def update(self, learning_rate: float) -> None:
        """Step the optimizer and clear the gradients; without gradients nothing moves."""
        optimizer = self.optimizer
        if self.gradients:
            moved = optimizer.step(self._trainable(), self.gradients, learning_rate)
            mx.eval(moved, optimizer.first, optimizer.second)
            self._put(moved)
        self.gradients = {}

    def loss(self, batch: Batch, objective: Objective = CROSS_ENTROPY) -> float:
        """The objective's loss of the batch, dropout off; the random state is left as it was."""
        arrays = arrays_of(batch, self.forward_pass.sizes)
        return float(self.forward_pass.loss(arrays, objective).item()) if arrays.targets.size else 0.0

    def save_logits(self, prompts: Sequence[Sequence[int]], path: Path) -> None:
        """Write the logits after each token of each prompt, (tokens, vocabulary) in float32, keyed "0", "1", ..."""
        logits = {str(index): self.forward_pass.logits(ids) for index, ids in enumerate(prompts)}
        write_tensors(logits, path)

    def logits_in_other_precision(self, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
        """What `save_logits` writes, the same weights computed in float64, which MLX has on the processor alone."""
        with mx.stream(mx.cpu), in_float64(self.loaded.model) as model:
            logits = [model(mx.array([list(ids)]))[0] for ids in prompts]
            mx.eval(logits)
        return [np.array(each).astype(np.float64) for each in logits]

    @contextlib.contextmanager
    def scaled(self, name: str, factor: float) -> Iterator[None]:
        """Within this context a weight of the base, by its name in the model's files, is `factor` times what it is."""
        model, names = self.loaded.model, self.loaded.names
        own = [
            (place, each)
            for place, each in tree_flatten(model.parameters())
            if f".{names.shown(place.replace('.base.', '.'))}".endswith(f".{name}")
        ]
        model.load_weights([(place, factor * each) for place, each in own], strict=False)
        try:
            yield
        finally:
            model.load_weights(own, strict=False)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        choose: ChooseTokens | None = None,
    ) -> list[list[int]]:
        """Continuations without the prompt and without the stop token, in the order of `prompts`."""
        return self.forward_pass.answers(prompts, max_new_tokens, stop_ids, choose)

    def adapter_disabled(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the model answers as its base would."""
        if self.adapter is None:
            raise TrainingError("the model has no adapter that could be disabled")
        return self.adapter.disabled(self.loaded.model)

    def fingerprints(self) -> dict[str, str]:
        """A hash of each parameter tensor by name, base and adapter."""
        tensors, base = self._tensors(), self._base()
        told = {name: base[place] for name, place in self._places().items()}
        if self.adapter:
            told |= {name: tensors[place] for name, place in self.adapter.tensors(self.loaded.names).items()}
        return {name: fingerprint(tensor) for name, tensor in told.items()}

    def trainable_names(self) -> list[str]:
        """Names of the tensors that training may change."""
        return list(self._trained)

    def gradient_norms(self) -> dict[str, float]:
        """The L2 norm of each trainable tensor's gradient, as accumulated so far."""
        return dict.fromkeys(self._trained, 0.0) | norms(self.gradients)

    def check_saving(self) -> None:
        """Refuse now what `save_model` could only refuse in the end.

        Raises:
            ModelError: mlx-lm keeps weights of this architecture in another form than the model's files.
        """
        names, adapter = self.loaded.names, self.adapter
        places = [adapter.own(place) if adapter else place for place in in_full(self.loaded.model, self._base())]
        names.refuse_foreign([names.shown(place) for place in places], "the model's weights")

    def save_model(self, folder: Path) -> None:
        """Write the whole model as transformers reads it, its adapter merged into it, into an existing folder.

        What is quantised is written in full.

        Raises:
            ModelError: mlx-lm keeps weights of this architecture in another form than the model's files.
        """
        names, adapter = self.loaded.names, self.adapter
        weights = in_full(self.loaded.model, self._base())
        if adapter is not None:
            weights = {adapter.own(place): tensor for place, tensor in weights.items()}
            for path, layer in adapter.layers.items():
                weights |= {f"{path}.{leaf}": tensor for leaf, tensor in layer.merged().items()}
            now = self._tensors()
            weights |= {place: now[place] for place in adapter.originals}
            weights |= {f"{path}.weight": table.merged() for path, table in adapter.tables.items()}
        tensors = names.to_files(weights)
        names.refuse_foreign(list(tensors), "the model's weights")
        write_config({**self.loaded.config, "dtype": self.loaded.dtype}, folder)
        write_tensors(tensors, folder / "model.safetensors")

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's own format, in float32, into an existing empty folder."""
        if self.adapter is None:
            raise ModelError("the model has no adapter that could be saved")
        write_adapter(self.adapter, self.loaded, public_name(self.location), folder)

    def load_adapter(self, folder: Path) -> None:
        """Put a saved adapter, PEFT's or mlx-lm's, on the model, frozen as PEFT does it; every tensor must match."""
        target, tensors = read_adapter(self._shapes, self._layers, self.loaded.names, folder)
        refuse_packed(self.loaded, target)
        self._take_off()
        self.adapter = put_on(self.loaded, target, tensors)
        self._trained = {}

    def start_from(self, folder: Path) -> None:
        """Give the attached adapter, which stays trainable, the weights that are saved in PEFT's format in a folder."""
        assert self.adapter is not None
        names, now = self.loaded.names, self._trainable()
        _, saved = read_adapter(self._shapes, self._layers, names, folder)
        whole = {place: saved.saved.get(names.shown(place)) for place in self.adapter.originals}
        rows = {f"{path}.rows": saved.rows.get(names.shown(path)) for path in self.adapter.tables}
        parts = {
            f"{path}.{key}": saved.parts.get(names.shown(path), {}).get(key)
            for path, layer in self.adapter.layers.items()
            for key in layer.parts
        }
        found = {**whole, **rows, **parts}
        start = {name: tensor for name, place in self._trained.items() if (tensor := found[place]) is not None}
        shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (start, now)]
        check_tensor_shapes(shapes[0], shapes[1], folder)
        self._put({name: tensor.astype(now[name].dtype) for name, tensor in start.items()})

    def save_state(self, folder: Path) -> None:
        """Write trainable tensors, optimizer and random state so that `load_state` continues bit for bit."""
        state.save_state(self._trainable(), self.optimizer, self._key, folder)

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote."""
        weights, self._key = state.load_state(self._trainable(), self.optimizer, folder)
        self._put(weights)

    def _tensors(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.loaded.model.parameters()))

    def _base(self) -> dict[str, mx.array]:
        """The model's own tensors by their places, as they are without the adapter."""
        if self.adapter is None:
            return self._tensors()
        own = self.adapter.tensors(self.loaded.names).values()
        base = {place: tensor for place, tensor in self._tensors().items() if place not in own}
        return base | self.adapter.originals

    def _places(self) -> dict[str, str]:
        """Where each of the model's own tensors lies, by its name; PEFT's once an adapter is on."""
        names, adapter = self.loaded.names, self.adapter
        if adapter is None:
            return {names.shown(place): place for place in self._base()}
        own = {place: names.shown(adapter.own(place)) for place in self._base()}
        adapted = {names.shown(path) for path in adapter.layers}
        saved = {names.shown(place) for place in adapter.originals}
        tables = {names.shown(path) for path in adapter.tables}
        return {frozen_name(plain, adapted, saved, tables): place for place, plain in own.items()}

    def _trainable(self) -> dict[str, mx.array]:
        tensors = self._tensors()
        return {name: tensors[place] for name, place in self._trained.items()}

    def _put(self, weights: dict[str, mx.array]) -> None:
        self.loaded.model.update(tree_unflatten([(self._trained[name], weight) for name, weight in weights.items()]))


def _as_memory_error(error: Exception, batch: Batch) -> Exception:
    text = str(error)
    if not isinstance(error, MemoryError) and not any(word in text for word in _EXHAUSTED):
        return error
    longest = max(len(row.ids) for row in batch.rows)
    return OutOfMemoryError(
        f"out of memory with {len(batch.rows)} rows of up to {longest} tokens: {first_line(error)}",
        hint="lower training.batch_size (and raise training.gradient_accumulation_steps), or lower tokens.max_length",
    )
