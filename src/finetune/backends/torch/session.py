"""A model in torch: train, score, ask, save."""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from finetune.adapters.kinds import kind_of, lr_ratio_and_decay
from finetune.backends.generate import answer_by_length
from finetune.backends.torch import head_loss, state
from finetune.backends.torch.device import is_exhausted, name_device, random_state, set_random_state
from finetune.backends.torch.float64 import Float64
from finetune.backends.torch.group import as_lost, pool_gradients
from finetune.backends.torch.lora_linear import fold_adapters
from finetune.backends.torch.packed import turned
from finetune.backends.torch.recompute import recompute_blocks
from finetune.data.batches import shared_start
from finetune.errors import OutOfMemoryError, TrainingError
from finetune.models.travel import public_name
from finetune.objectives.cross_entropy import CROSS_ENTROPY
from finetune.ports import ChooseTokens, Group, Objective
from finetune.reading import read_json
from finetune.records import NO_LIMIT, AdapterTarget, Batch, ModelLocation, Optimization

_INNER = re.compile(r"\.(token_adapter\.)?(base_layer|original_module)(?=\.)")
"""Where PEFT keeps a module's own weights once it has put something around it."""


class TorchSession:
    """One loaded model; implements `ports.Session` with torch and PEFT."""

    def __init__(self, model: Any, location: ModelLocation, pad_id: int) -> None:
        self.model = model
        self.location = location
        self.pad_id = pad_id
        self.context_length = int(getattr(model.config, "max_position_embeddings", NO_LIMIT))
        self._optimizer: torch.optim.AdamW | None = None
        self._max_grad_norm = 1.0
        self.model.eval()

    @property
    def device(self) -> str:
        """Where the model computes: "cpu", or a GPU by its name."""
        return name_device(self._place)

    @property
    def _place(self) -> torch.device:
        place: torch.device = self.model.device
        return place

    def attach(self, target: AdapterTarget | None, seed: int) -> None:
        """Put a freshly initialised adapter on the model and freeze the rest; None makes every weight trainable."""
        # Before the adapter is drawn, not after: the seed fixes its initial values too.
        torch.manual_seed(seed)
        if target is None:
            self.model.requires_grad_(requires_grad=True)
            return
        import peft

        kind = kind_of(target)
        paths = {path: state.whole_paths(self.model, (path,))[0] for path in target.rows}
        target = replace(target, rows={paths[path]: rows for path, rows in target.rows.items()})
        config = getattr(peft, kind.peft_config)(
            **kind.write_peft(target),
            target_modules=list(target.modules),
            modules_to_save=state.whole_paths(self.model, target.saved) or None,
            fan_in_fan_out=turned(self.model),
            task_type="CAUSAL_LM",
        )
        self.model.name_or_path = public_name(self.location)
        with state.quiet_wrapping():
            self.model = peft.get_peft_model(self.model, config)
        # PEFT looks at layers that are packed, and those are never turned: what is saved goes with the model's files.
        config.fan_in_fan_out = turned(self.model)
        fold_adapters(self.model)

    def prepare_updates(self, optimization: Optimization) -> None:
        """Make the optimizer for everything that is trainable."""
        # Looked at now, while this process holds the whole model: later it would need all the others for that.
        self._head  # noqa: B018
        self._max_grad_norm = optimization.max_grad_norm
        if optimization.gradient_checkpointing:
            recompute_blocks(self.model)
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
        for name, tensor in self._trainable().items():
            groups[lr_ratio_and_decay(optimization, name, tensor.ndim)].append(tensor)
        self._optimizer = torch.optim.AdamW(
            [{"params": tensors, "weight_decay": decay, "lr_ratio": pace} for (pace, decay), tensors in groups.items()],
            lr=0.0,
            betas=optimization.betas,
            eps=optimization.epsilon,
            fused=True,
        )

    def accumulate(self, batch: Batch, weight: float, objective: Objective = CROSS_ENTROPY) -> float:
        """Add `weight` x (the objective's loss of the batch) to the gradients; returns that loss."""
        self.model.train()
        try:
            loss = self._loss(batch, objective)
            (loss * weight).backward()
        except (RuntimeError, MemoryError) as error:
            raise _as_memory_error(error, batch) from error
        return float(loss.detach())

    def pool_gradients(self, group: Group) -> None:
        """Add up the gradients of all processes of a group: afterwards each has the sum."""
        pool_gradients(self._trainable().values(), group)

    def reseed(self, seed: int) -> None:
        """Draw the random numbers of training from this seed from now on."""
        torch.manual_seed(seed)

    def clip_gradients(self) -> float:
        """Clip all gradients together to the limit; returns their L2 norm before clipping."""
        return float(torch.nn.utils.clip_grad_norm_(self._trainable().values(), self._max_grad_norm))

    def update(self, learning_rate: float) -> None:
        """Step the optimizer and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """The optimizer that `prepare_updates` made."""
        if self._optimizer is None:
            raise TrainingError("prepare_updates must come before the first update")
        return self._optimizer

    def loss(self, batch: Batch, objective: Objective = CROSS_ENTROPY) -> float:
        """The objective's loss of the batch, dropout off; mode and random state are left as they were."""
        with self._at_rest(), torch.no_grad():
            return float(self._loss(batch, objective))

    def save_logits(self, prompts: Sequence[Sequence[int]], path: Path) -> None:
        """Write the logits after each token of each prompt, (tokens, vocabulary) in float32, keyed "0", "1", ..."""
        with self._at_rest(), torch.no_grad():
            logits = [self.model(input_ids=self._ids([ids])).logits[0].float().cpu() for ids in prompts]
        save_file({str(index): tensor.contiguous() for index, tensor in enumerate(logits)}, path)

    def logits_in_other_precision(self, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
        """What `save_logits` writes, the same weights computed in float64."""
        # Together, padded on the right where causal attention never looks: each weight is widened once for them all.
        # But not beside one four times as long: padding would cost more than widening.
        most, alike = max(map(len, prompts), default=0), dict[bool, list[int]]()
        for number, ids in enumerate(prompts):
            alike.setdefault(4 * len(ids) > most, []).append(number)
        found: dict[int, NDArray[np.float64]] = {}
        for numbers in alike.values():
            longest = max(len(prompts[number]) for number in numbers)
            padded = [[*prompts[number], *[0] * (longest - len(prompts[number]))] for number in numbers]
            with self._at_rest(), torch.no_grad(), Float64():
                logits = self.model(input_ids=self._ids(padded), use_cache=False).logits
            for number, row in zip(numbers, logits, strict=True):
                found[number] = row[: len(prompts[number])].cpu().numpy()
        return [found[number] for number in range(len(prompts))]

    @contextlib.contextmanager
    def scaled(self, name: str, factor: float) -> Iterator[None]:
        """Within this context a weight of the base, by its name in the model's files, is `factor` times what it is."""
        tensor = next(
            each for found, each in self.model.named_parameters() if f".{_INNER.sub('', found)}".endswith(f".{name}")
        )
        before = tensor.detach().clone()
        try:
            tensor.data.mul_(factor)
            yield
        finally:
            tensor.data.copy_(before)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        choose: ChooseTokens | None = None,
    ) -> list[list[int]]:
        """Continuations without the prompt and without the stop token, in the order of `prompts`."""
        with self._at_rest(), torch.no_grad():
            return answer_by_length(
                prompts,
                max_new_tokens,
                self.context_length,
                lambda alike, room: self._continue(self._ids(alike), room, stop_ids, choose),
            )

    def _ids(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([list(ids) for ids in prompts], device=self._place)

    def _continue(
        self, ids: torch.Tensor, room: int, stop_ids: Sequence[int], choose: ChooseTokens | None
    ) -> list[list[int]]:
        from transformers import GenerationConfig

        def only_chosen(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            assert choose is not None
            chosen = torch.from_numpy(choose(logits.float().cpu().numpy())).to(logits.device)
            return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)

        config = GenerationConfig(
            max_new_tokens=room, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=self.pad_id
        )
        with self._without_preferences():
            full = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=[only_chosen] if choose else [],
            )
        # A row that ends before others is filled up after its stop token.
        return [
            list(itertools.takewhile(lambda word: word not in stop_ids, row))
            for row in full[:, ids.shape[1] :].tolist()
        ]

    @contextlib.contextmanager
    def _without_preferences(self) -> Iterator[None]:
        """Set aside the model's own generation settings, such as penalties: what `_continue` leaves open is theirs."""
        from transformers import GenerationConfig

        holders = [module for module in self.model.modules() if hasattr(module, "generation_config")]
        own = [(holder, holder.generation_config) for holder in holders]
        for holder in holders:
            holder.generation_config = GenerationConfig()
        try:
            yield
        finally:
            for holder, preferences in own:
                holder.generation_config = preferences

    def adapter_disabled(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the model answers as its base would."""
        context: contextlib.AbstractContextManager[None] = self.model.disable_adapter()
        return context

    def fingerprints(self) -> dict[str, str]:
        """A hash of each parameter tensor by name, base and adapter."""
        return {name: _fingerprint(tensor) for name, tensor in self.model.named_parameters()}

    def trainable_names(self) -> list[str]:
        """Names of the tensors that training may change."""
        return list(self._trainable())

    def gradient_norms(self) -> dict[str, float]:
        """The L2 norm of each trainable tensor's gradient, as accumulated so far."""
        return {
            name: float(tensor.grad.norm()) if tensor.grad is not None else 0.0
            for name, tensor in self._trainable().items()
        }

    def check_saving(self) -> None:
        """Refuse now what `save_model` could only refuse in the end: nothing."""

    def save_model(self, folder: Path) -> None:
        """Write the whole model as transformers reads it, its adapter merged into it, into an existing folder."""
        state.merged(self.model).save_pretrained(str(folder))

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's own format into an existing empty folder."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        path = folder / "adapter_config.json"
        settings = read_json(path)
        for key, value in vars(self.model.peft_config["default"]).items():
            if isinstance(value, set):
                # PEFT writes a set in whatever order it has today: sorted, the same run gives the same bytes.
                settings[key] = sorted(value)
            elif isinstance(value, dict) and key.endswith("_pattern"):
                # PEFT sorts these by name, and by that changes which pattern is the first that fits.
                settings[key] = dict(value)
        path.write_text(json.dumps(dict(sorted(settings.items())), indent=2) + "\n", encoding="utf-8")

    def load_adapter(self, folder: Path) -> None:
        """Put a saved adapter on the model; every tensor must match."""
        self.model = state.load_peft_adapter(self.model, folder)
        self.model.eval()

    def start_from(self, folder: Path) -> None:
        """Give the attached adapter, which stays trainable, the weights that are saved in PEFT's format in a folder."""
        state.start_from(self._trainable(), folder)

    def save_state(self, folder: Path) -> None:
        """Write adapter, optimizer and random state so that `load_state` continues bit for bit."""
        state.save_state(self._trainable(), self.optimizer, random_state(self._place), folder)

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote."""
        kinds = random_state(self._place).keys()
        set_random_state(state.load_state(self._trainable(), self.optimizer, kinds, folder), self._place)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def _loss(self, batch: Batch, objective: Objective = CROSS_ENTROPY) -> torch.Tensor:
        arrays = batch.arrays(self.pad_id)
        # Put together where reading it costs nothing, then sent where the model is.
        ids, targets, here, positions = (
            torch.from_numpy(array).to(self._place)
            for array in (arrays.ids, arrays.targets, arrays.here, arrays.positions)
        )
        # No mask: padding stands at the end, where no real token of a causal model looks, and attention skips half.
        # Logits are made only where a target follows: most positions of a prompt never need any.
        asked = {"input_ids": ids, "attention_mask": None, "logits_to_keep": here, "use_cache": False}
        if batch.packed:
            # Positions that begin anew are how transformers knows that rows share a sequence.
            asked["position_ids"] = positions
        if (
            not torch.is_grad_enabled()
            and (once := shared_start(batch))
            and (kept := self._read_once(ids[:1, :once], len(ids)))
        ):
            asked |= {"input_ids": ids[:, once:], "logits_to_keep": here[:, once:], "past_key_values": kept}
        head = self._head
        if head is None or not head_loss.is_frozen(head, self.model):
            logits = self.model(**asked).logits.float()
            losses = functools.partial(head_loss.table_losses, logits, targets, objective.label_smoothing)
        else:
            with head_loss.without_head(head):
                hidden = self.model(**asked).logits
            losses = functools.partial(head_loss.head_losses, hidden, head, targets, objective.label_smoothing)
        if objective.summed:
            return losses()
        with torch.no_grad():
            value, slopes = objective.total(batch, losses(each=True).double().cpu().numpy())
        if not torch.is_grad_enabled():
            return torch.tensor(value, dtype=torch.float64)
        total = losses(torch.from_numpy(slopes).to(self._place, torch.float32))
        # The gradient is that of the weighed losses, the value is the objective's own.
        return total + (value - total.detach())

    def _read_once(self, prompt: torch.Tensor, rows: int) -> Any:
        """What the layers keep of a prompt, (1, tokens), for so many rows that go on from it.

        None where they keep more than keys and values, or nothing.
        """
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        read = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        kept: Any = getattr(read, "past_key_values", None)
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        if type(kept) is not DynamicCache or any(type(layer) not in plain for layer in kept.layers):
            return None
        kept.batch_repeat_interleave(rows)
        return kept

    @functools.cached_property
    def _head(self) -> torch.nn.Linear | None:
        with self._at_rest(), torch.no_grad():
            return head_loss.find_head(self.model)

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        drawn = random_state(self._place)
        self.model.eval()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            raise _as_memory_error(error) from error
        finally:
            set_random_state(drawn, self._place)
            for module, training in modes.items():
                module.training = training


def _fingerprint(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()


def _as_memory_error(error: Exception, batch: Batch | None = None) -> Exception:
    if not is_exhausted(error):
        return as_lost(error)
    what = f" with {len(batch.rows)} rows of up to {max(len(row.ids) for row in batch.rows)} tokens" if batch else ""
    return OutOfMemoryError(
        f"out of memory{what}: {next(iter(str(error).splitlines()), '')}",
        hint="lower training.batch_size (and raise training.gradient_accumulation_steps), or lower tokens.max_length",
    )
