"""A Llama in NumPy: train, score, ask, save."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from finetune.adapters.peft_files import WEIGHTS, check_tensor_shapes, frozen_name, on_disk
from finetune.backends.generate import answer_by_length, greedy, until_stops
from finetune.backends.reference import state
from finetune.backends.reference.adapter import ReferenceAdapter, draw_adapter, read_adapter, write_adapter
from finetune.backends.reference.architecture import HEAD, Architecture
from finetune.backends.reference.model import Array, ReferencePass, cross_entropy
from finetune.backends.reference.optimizer import ReferenceAdamW, clip
from finetune.backends.reference.weights import read_tensors
from finetune.errors import ModelError, TrainingError
from finetune.models.shape import read_config
from finetune.models.travel import public_name
from finetune.objectives.cross_entropy import CROSS_ENTROPY
from finetune.ports import ChooseTokens, Group, Objective
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization


class ReferenceSession:
    """One loaded Llama; implements `ports.Session` in float64, with the tensor names of torch and PEFT."""

    def __init__(self, shape: Architecture, weights: dict[str, Array], location: ModelLocation, pad_id: int) -> None:
        self.shape = shape
        self.weights = weights
        self.location = location
        self.pad_id = pad_id
        self.adapter: ReferenceAdapter | None = None
        self.trainable: dict[str, Array] = weights
        self.gradients: dict[str, Array] = {}
        self._random = np.random.Generator(np.random.PCG64(0))
        self._optimizer: ReferenceAdamW | None = None

    @property
    def device(self) -> str:
        """Where the model computes."""
        return "cpu"

    def attach(self, target: AdapterTarget | None, seed: int) -> None:
        """Put a freshly initialised adapter on the model and freeze the rest; None makes every weight trainable.

        Raises:
            ModelError: a name in `target.modules` matches no linear layer.
        """
        random = np.random.Generator(np.random.PCG64(seed))
        self._set_adapter(draw_adapter(self.weights, self.shape.linear_layers(), target, random) if target else None)
        self._random = random  # dropout goes on where the adapter's values ended

    def _set_adapter(self, adapter: ReferenceAdapter | None) -> None:
        self.adapter = adapter
        self.trainable = adapter.tensors() if adapter else self.weights
        self.gradients = {}
        self._optimizer = None

    def prepare_updates(self, optimization: Optimization) -> None:
        """Make the optimizer for everything that is trainable."""
        self._optimizer = ReferenceAdamW(self.trainable, optimization)

    @property
    def optimizer(self) -> ReferenceAdamW:
        """The optimizer that `prepare_updates` made."""
        if self._optimizer is None:
            raise TrainingError("prepare_updates must come before the first update")
        return self._optimizer

    def accumulate(self, batch: Batch, weight: float, objective: Objective = CROSS_ENTROPY) -> float:
        """Add `weight` x (the objective's loss of the batch) to the gradients; returns that loss."""
        if not self.trainable:
            raise TrainingError("nothing is trainable: a loaded adapter is frozen", hint="attach a fresh adapter")
        with_gradients = frozenset(self.trainable)
        if self.adapter:
            with_gradients |= {*self.adapter.saved, *(f"{path}.weight" for path in self.adapter.rows)}
        forward_pass = ReferencePass(
            self.shape, self._weights_now(), self.adapter, with_gradients, self._random, self.gradients
        )
        # NaN and infinity pass through in silence: the training loop looks for them in the loss and the norm.
        with np.errstate(all="ignore"):
            loss, backward = self._loss(forward_pass, batch, objective)
            backward(weight)
        return loss

    def pool_gradients(self, group: Group) -> None:
        """Add up the gradients of all processes of a group: afterwards each has the sum."""
        own = [self.gradients.get(name, np.zeros_like(tensor)) for name, tensor in self.trainable.items()]
        whole = group.sum(np.concatenate([gradient.ravel() for gradient in own]))
        parts = np.split(whole, np.cumsum([gradient.size for gradient in own])[:-1])
        self.gradients = {
            name: part.reshape(tensor.shape) for (name, tensor), part in zip(self.trainable.items(), parts, strict=True)
        }

    def reseed(self, seed: int) -> None:
        """Draw the random numbers of training from this seed from now on."""
        self._random.bit_generator.state = np.random.PCG64(seed).state

    def clip_gradients(self) -> float:
        """Clip all gradients together to the limit; returns their L2 norm before clipping."""
        with np.errstate(all="ignore"):
            return clip(self.gradients.values(), self.optimizer.optimization.max_grad_norm)

    def update(self, learning_rate: float) -> None:
        """Step the optimizer and clear the gradients; without gradients nothing moves."""
        optimizer = self.optimizer
        if self.gradients:
            with np.errstate(all="ignore"):
                optimizer.step(self.gradients, learning_rate)
        self.gradients = {}

    def loss(self, batch: Batch, objective: Objective = CROSS_ENTROPY) -> float:
        """The objective's loss of the batch, dropout off; the random state is left as it was."""
        with np.errstate(all="ignore"):
            return self._loss(ReferencePass(self.shape, self._weights_now(), self.adapter), batch, objective)[0]

    def logits(self, ids: Sequence[int]) -> Array:
        """The logits (tokens, vocabulary) after each token of a prompt."""
        logits: Array = self._logits(
            ReferencePass(self.shape, self._weights_now(), self.adapter), np.array([list(ids)], np.int64)
        )[0]
        return logits

    def save_logits(self, prompts: Sequence[Sequence[int]], path: Path) -> None:
        """Write the logits after each token of each prompt, (tokens, vocabulary) in float32, keyed "0", "1", ..."""
        save_file({str(index): self.logits(ids).astype(np.float32) for index, ids in enumerate(prompts)}, path)

    def logits_in_other_precision(self, prompts: Sequence[Sequence[int]]) -> list[Array]:
        """What `save_logits` writes, computed in float32 as other backends do."""
        weights = {name: weight.astype(np.float32) for name, weight in self._weights_now().items()}
        adapter = self.adapter and replace(
            self.adapter,
            layers={
                path: {key: part.astype(np.float32) for key, part in parts.items()}
                for path, parts in self.adapter.layers.items()
            },
        )
        narrow: Mapping[str, Any] = weights
        forward_pass = ReferencePass(self.shape, narrow, adapter)
        return [self._logits(forward_pass, np.array([list(ids)], np.int64))[0].astype(np.float64) for ids in prompts]

    @contextlib.contextmanager
    def scaled(self, name: str, factor: float) -> Iterator[None]:
        """Within this context a weight of the base, by its name in the model's files, is `factor` times what it is."""
        weights, self.weights = self.weights, {**self.weights, name: factor * self.weights[name]}
        try:
            yield
        finally:
            self.weights = weights

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        choose: ChooseTokens | None = None,
    ) -> list[list[int]]:
        """Continuations without the prompt and without the stop token, in the order of `prompts`."""
        return answer_by_length(
            prompts,
            max_new_tokens,
            self.shape.max_position_embeddings,
            lambda alike, room: until_stops(self._words(alike, room, choose or greedy), len(alike), stop_ids),
        )

    def _words(self, prompts: Sequence[Sequence[int]], room: int, choose: ChooseTokens) -> Iterator[Sequence[int]]:
        """The next token of each prompt, `room` times; the prompts are of one length."""
        forward_pass = ReferencePass(self.shape, self._weights_now(), self.adapter, cache={})
        ids = np.array([list(ids) for ids in prompts], np.int64)
        for _ in range(room):
            ids = choose(self._logits(forward_pass, ids, last=True)[:, 0])[:, None]
            yield ids[:, 0].tolist()

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Within this context the model answers as its base would."""
        if self.adapter is None:
            raise TrainingError("the model has no adapter that could be disabled")
        adapter, self.adapter = self.adapter, None
        try:
            yield
        finally:
            self.adapter = adapter

    def merged_weights(self) -> dict[str, Array]:
        """Every weight of a model without an adapter that computes the same."""
        if self.adapter is None:
            return dict(self.weights)
        grown = {
            f"{path}.weight": self.adapter.merged(path, self.weights[f"{path}.weight"]) for path in self.adapter.layers
        }
        return {**self._weights_now(), **grown}

    def _weights_now(self) -> Mapping[str, Array]:
        """The weights that the model computes with: an adapter's own where it trains a module whole, or rows."""
        return self.weights if self.adapter is None else self.adapter.weights(self.weights)

    def fingerprints(self) -> dict[str, str]:
        """A hash of each parameter tensor by name, base and adapter."""
        tensors = dict(self.weights)
        if adapter := self.adapter:
            shown = {name: frozen_name(name, adapter.layers, adapter.saved, adapter.rows) for name in self.weights}
            tensors = {shown[name]: weight for name, weight in self.weights.items()} | adapter.tensors()
        return {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()}

    def trainable_names(self) -> list[str]:
        """Names of the tensors that training may change."""
        return list(self.trainable)

    def gradient_norms(self) -> dict[str, float]:
        """The L2 norm of each trainable tensor's gradient, as accumulated so far."""
        with np.errstate(all="ignore"):
            return {name: float(np.linalg.norm(self.gradients.get(name, 0.0))) for name in self.trainable}

    def check_saving(self) -> None:
        """Refuse now what `save_model` could only refuse in the end: nothing."""

    def save_model(self, folder: Path) -> None:
        """Write the whole model in float32, its adapter merged into it, into an existing folder."""
        config = read_config(self.location.folder) | {"dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: weight.astype(np.float32) for name, weight in self.merged_weights().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's own format, in float32, into an existing empty folder."""
        if self.adapter is None:
            raise ModelError("the model has no adapter that could be saved")
        write_adapter(self.adapter, public_name(self.location), folder)

    def load_adapter(self, folder: Path) -> None:
        """Put a saved adapter on the model, frozen as PEFT does it; every tensor must match."""
        self._set_adapter(read_adapter(self.weights, self.shape.linear_layers(), folder))
        self.trainable = {}

    def start_from(self, folder: Path) -> None:
        """Give the attached adapter, which stays trainable, the weights that are saved in PEFT's format in a folder."""
        saved = read_tensors(folder / WEIGHTS, f"adapter {folder}")
        expected = {on_disk(name): tensor.shape for name, tensor in self.trainable.items()}
        check_tensor_shapes({name: tensor.shape for name, tensor in saved.items()}, expected, folder)
        for name, tensor in self.trainable.items():
            tensor[...] = saved[on_disk(name)]

    def save_state(self, folder: Path) -> None:
        """Write trainable tensors, optimizer and random state so that `load_state` continues bit for bit."""
        state.save_state(self.optimizer, self._random, folder)

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote."""
        state.load_state(self.optimizer, self._random, folder)

    def _logits(self, forward_pass: ReferencePass, ids: NDArray[np.int64], *, last: bool = False) -> Array:
        """(rows, tokens) ids without padding -> (rows, tokens or only the last, vocabulary)."""
        with np.errstate(all="ignore"):
            hidden, _ = forward_pass.hidden(ids, np.zeros_like(ids))
            rows, tokens = ids.shape
            if last:
                hidden, tokens = hidden.reshape(rows, tokens, -1)[:, -1], 1
            return forward_pass.linear(HEAD, hidden)[0].reshape(rows, tokens, -1)

    def _loss(
        self, forward_pass: ReferencePass, batch: Batch, objective: Objective
    ) -> tuple[float, Callable[[float], Array]]:
        arrays = batch.arrays(self.pad_id)
        here = arrays.here.reshape(-1)
        hidden, hidden_back = forward_pass.hidden(arrays.ids, arrays.starts)
        # Logits are made only where a target follows: most positions of a prompt never need any.
        logits, head_back = forward_pass.linear(HEAD, hidden[here])
        losses, dlogits = cross_entropy(logits, arrays.targets, objective.label_smoothing)
        loss, slopes = objective.total(batch, losses)

        def backward(weight: float) -> Array:
            dhidden = np.zeros_like(hidden)
            dhidden[here] = head_back((weight * slopes)[:, None] * dlogits)
            return hidden_back(dhidden)

        return loss, backward
