"""Says before a run what it will take at its peak, part by part: at least, as expected, and at most."""

from dataclasses import dataclass

from finetune.memory.estimate import BYTES, Estimate, estimate_memory
from finetune.memory.framework import MIB, Framework
from finetune.memory.kept import KNOWN, ActivationBytes, kept_by_torch
from finetune.memory.kept_reference import kept_by_reference
from finetune.memory.load import StepLoad
from finetune.records import AdapterTarget, ModelShape

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "heap", "framework")


@dataclass(frozen=True, slots=True)
class Footprint:
    """What each part takes when it is largest, in bytes, and the peak of all together.

    `activations` is what waits for the backward pass and what comes and goes around it; `heap` is what the C library
    keeps of freed tensors because smaller ones lie between them. `tensors` is the peak of live tensors alone; `total`
    is the peak of the process, as the operating system sees it.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    heap: int
    framework: int
    tensors: int
    total: int

    @property
    def overlap(self) -> int:
        """What the parts never take at the same time, as gradients grow while activations go."""
        parts: int = sum(getattr(self, part) for part in PARTS)
        return parts - self.total


@dataclass(frozen=True, slots=True)
class Forecast:
    """One method's footprint for one step: `low` <= `expected` <= `high` in each part and in total."""

    low: Footprint
    expected: Footprint
    high: Footprint
    trainable_parameters: int


_HEAP = {
    ("torch", "adapter"): (0.45, 0.9),
    ("torch", "full"): (0.2, 0.5),
    ("reference", "adapter"): (0.06, 0.2),
    ("reference", "full"): (0.06, 0.2),
}
"""The share of activations that the heap wastes: expected and highest, by backend and method, measured with glibc.

Small tensors that outlive the large ones they were allocated between keep what these leave from being joined: resident
memory lay above live tensors by 0.17 to 0.68 of the activations where these were over 100 MB, on five models in nine
sizes; in full fine-tuning by 0.1 to 0.4 of them. An allocator that returns every large block at once wastes nothing,
hence `low`.
"""
_MOST_HEAP_PER_BLOCK = 176 * MIB
"""Above 32 MiB glibc gives each tensor pages of its own and takes them back: activations of more than this in each
block waste no more. Measured with LoRA on a model of four blocks: 77 MiB wasted per block with 15,360 tokens at once,
148 with 30,720 and 67 with 57,600."""
_KNOWN_BAND, _OTHER_BAND = (0.95, 1.05), (0.5, 2.5)
"""How far activations may lie from the count: where blocks are counted tensor by tensor, and where they are not."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What is trained, how, and by which backend."""

    shape: ModelShape
    target: AdapterTarget | None
    dtype: str
    backend: str

    @property
    def exact(self) -> Estimate:
        return estimate_memory(self.shape, self.target, self.dtype)

    def kept(self, load: StepLoad, factor: float) -> ActivationBytes:
        """What a step keeps, times a factor; logits are certain in every architecture."""
        if self.backend == "reference":
            counted = kept_by_reference(self.shape, self.target, load)
        else:
            counted = kept_by_torch(self.shape, self.target, self.dtype, load)
        return ActivationBytes(
            blocks=round(factor * counted.blocks),
            first_block=round(factor * counted.first_block),
            outside=round(factor * counted.outside),
            logits=counted.logits,
            brief=round(factor * counted.brief),
        )

    @property
    def read(self) -> int:
        """What is read of a model's files while it is quantised: pages that the system may take back at any time."""
        return self.shape.parameters * BYTES[self.dtype] if self.shape.quantized else 0

    def passing(self, load: StepLoad) -> int:
        """What comes and goes at the far end of a step, in bytes: tables of the embedding's size, and loading.

        Both gradients of a tied table wait for each other and are then summed into a third; gradients of an earlier
        batch need the new one beside them. The reference backend loads float32 and float64 side by side, and its
        AdamW computes with two copies of a tensor.
        """
        table = self.shape.vocab_size * self.shape.hidden_size * BYTES[self.dtype]
        if self.backend == "reference":
            return max(self.exact.weights // 2, 0 if self.target and not self.target.rows else 2 * table)
        if self.target:
            return table if self.target.rows else 0
        return table * (2 * self.shape.tied_head + (load.accumulation > 1))

    def peak(self, kept: ActivationBytes, load: StepLoad) -> int:
        """The highest sum of what lives in a step only: the largest of its moments, in the order they come."""
        gradients = self.exact.gradients
        carried = gradients if load.accumulation > 1 else 0
        loss = kept.activations + kept.logits + carried
        if self.backend == "reference":  # nothing is given back before the end
            return max(loss, kept.activations + kept.logits // 3 + kept.brief + gradients, self.passing(load))
        if self.target and self.target.rows:  # the gradient of the whole table, of which the rows are taken
            loss = max(loss, kept.activations + kept.logits // 3 + carried + self.passing(load))
        head = 0 if self.target else self.shape.vocab_size * self.shape.hidden_size * BYTES[self.dtype]
        last_block = kept.blocks + kept.brief + head + carried
        # The gradient of an embedding table of its own comes last of all.
        waiting = 0 if self.shape.tied_head or carried else head
        first_block = kept.first_block + kept.brief + gradients - waiting
        return max(loss, last_block, first_block, gradients + self.passing(load))

    def footprint(
        self, kept: ActivationBytes, load: StepLoad, framework: int, heap: float, *, again: bool = False
    ) -> Footprint:
        """All parts; `heap` is the share of activations that it wastes, 0 for an allocator that wastes nothing.

        `again`: what a block computes again leaves pieces in it, too, as where all of its tensors are small.
        """
        exact, passing = self.exact, self.passing(load)
        stays = exact.weights + exact.adapter + exact.optimizer
        peak = self.peak(kept, load)
        held = kept.activations + again * kept.brief
        wasted = round(heap * min(held, self.shape.layers * _MOST_HEAP_PER_BLOCK))
        # Where the heap holds on to what activations leave, gradients find no room in it.
        resident = max(peak, kept.activations + exact.gradients + passing) if heap else peak
        loading = exact.weights + self.read if heap else 0
        return Footprint(
            weights=exact.weights,
            adapter=exact.adapter,
            gradients=exact.gradients,
            optimizer=exact.optimizer,
            activations=kept.activations + kept.brief + passing,
            logits=kept.logits,
            heap=wasted,
            framework=framework,
            tensors=stays + peak,
            total=max(stays + resident + wasted, loading) + framework,
        )


def forecast_memory(
    shape: ModelShape, target: AdapterTarget | None, dtype: str, load: StepLoad, framework: Framework
) -> Forecast:
    """What training takes for LoRA with `target`, or for full fine-tuning where `target` is None.

    Args:
        dtype: float32 or bfloat16; the reference backend computes in float64 whatever it is.
        load: the largest batch. `low` supposes that one token a row is trained and no row padded, `high` that all
            are trained and some padded.
        framework: what the process itself takes, and which backend computes.
    """
    backend = framework.backend
    job = _Job(shape, target, "float64" if backend == "reference" else dtype, backend)
    least, most = _KNOWN_BAND if shape.architecture in KNOWN else _OTHER_BAND
    if shape.quantized:
        framework = framework.packing
    heap, most_heap = _HEAP[backend, "adapter" if target else "full"]
    return Forecast(
        low=job.footprint(job.kept(load.lightest, least), load.lightest, framework.low, 0.0),
        expected=job.footprint(job.kept(load, 1.0), load, framework.expected, heap),
        high=job.footprint(
            job.kept(load.heaviest, most), load.heaviest, framework.high, most_heap, again=load.recomputed
        ),
        trainable_parameters=job.exact.trainable_parameters,
    )
