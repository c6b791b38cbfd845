"""LoRA: beside a frozen weight W (out x in), a product of two thin matrices is trained: W + s B A.

A is (rank x in) and B (out x rank); s is alpha / rank, or alpha / sqrt(rank), which is called rsLoRA. A starts uniform
within 1 / sqrt(in), which is Kaiming's with a = sqrt(5), and B at zero: so the first step reaches B alone.

Source: Hu et al. 2021 (arXiv:2106.09685), Hayou et al. 2024 (arXiv:2402.12354, LoRA+) and `LoraLayer` of Hugging Face
PEFT; what torch keeps is what `torch.autograd.graph.saved_tensors_hooks` saw of PEFT 0.21.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from finetune.adapters.kind import F32, AdapterKind, AdapterTensor, LayerPass, Parts, Readers, Shape, read_rows, switch
from finetune.records import AdapterTarget


class LoRA(AdapterKind):
    """Two thin matrices beside each weight."""

    name = "lora"
    title = "LoRA"
    about = "a LoRA adapter"
    settings = frozenset({"rank", "alpha", "dropout", "scaling", "rank_pattern", "alpha_pattern"})
    tensors: ClassVar[tuple[AdapterTensor, ...]] = (
        AdapterTensor("A", "lora_A.default.weight", "lora_A.weight", first_gradient="zero"),
        AdapterTensor("B", "lora_B.default.weight", "lora_B.weight", fast=True, first_gradient="some"),
    )
    low_rank = True
    token_rows = True
    peft_type = "LORA"
    peft_config = "LoraConfig"
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "bias": ("none",),
        "init_lora_weights": (None, True, False, "gaussian"),
    }
    mlx_lm_layer = "mlx_lm.tuner.lora:LoRALinear"
    mlx_lm_names: ClassVar[Mapping[str, str]] = {"A": "lora_a", "B": "lora_b"}

    def shapes(self, target: AdapterTarget, path: str, outputs: int, inputs: int) -> dict[str, Shape]:
        """A and B."""
        rank = target.rank_of(path)
        return {"A": (rank, inputs), "B": (outputs, rank)}

    def start(
        self, xp: Any, shapes: Mapping[str, Shape], uniform: Callable[[float, Shape], Any], weight: Callable[[], Any]
    ) -> dict[str, Any]:
        """A is drawn, B is zero."""
        return {"A": uniform(1 / math.sqrt(shapes["A"][1]), shapes["A"]), "B": xp.zeros(shapes["B"])}

    def forward(self, xp: Any, parts: Parts, seen: LayerPass) -> tuple[Any, tuple[Any, ...]]:
        """X W' + s kept A' B'."""
        small = seen.kept @ parts["A"].T
        return seen.base(seen.x) + seen.scale * (small @ parts["B"].T), (small,)

    def backward(self, parts: Parts, seen: LayerPass, saved: tuple[Any, ...], dy: Any) -> tuple[dict[str, Any], Any]:
        """Of A, B and x."""
        gradients, dkept = self._through_factors(parts, seen, saved[0], dy)
        return gradients, dy @ seen.weight() + (dkept if seen.keep is None else dkept * seen.keep)

    def _through_factors(self, parts: Parts, seen: LayerPass, small: Any, dy: Any) -> tuple[dict[str, Any], Any]:
        """The gradients of A and B, and of what the adapter reads, by way of s kept A' B' alone."""
        dsmall = seen.scale * (dy @ parts["B"])
        return {"A": dsmall.T @ seen.kept, "B": seen.scale * (dy.T @ small)}, dsmall @ parts["A"]

    def merged(self, xp: Any, parts: Parts, scale: float, weight: Any) -> Any:
        """W + s B A."""
        return weight + scale * (parts["B"] @ parts["A"])

    def write_peft(self, target: AdapterTarget) -> dict[str, Any]:
        """Those of `LoraConfig`."""
        return {
            "alpha_pattern": dict(target.alpha_pattern),
            "bias": "none",
            "init_lora_weights": True,
            "lora_alpha": target.alpha,
            "lora_dropout": target.dropout,
            "r": target.rank,
            "rank_pattern": dict(target.rank_pattern),
            "trainable_token_indices": {path: list(rows) for path, rows in target.rows.items()} or None,
            "use_dora": not self.low_rank,
            "use_rslora": target.scaling == "rank_stabilized",
        }

    def fits_peft(self, settings: Mapping[str, Any]) -> bool:
        """LoRA's and DoRA's differ by a switch."""
        return super().fits_peft(settings) and switch(settings, "use_dora") != self.low_rank

    def read_peft(self, settings: Mapping[str, Any], modules: tuple[str, ...]) -> AdapterTarget:
        """Those of `LoraConfig`."""
        return AdapterTarget(
            settings["r"],
            settings["lora_alpha"],
            settings.get("lora_dropout", 0.0),
            modules,
            self.name,
            "rank_stabilized" if switch(settings, "use_rslora") else "standard",
            dict(settings.get("rank_pattern") or {}),
            dict(settings.get("alpha_pattern") or {}),
            rows=read_rows(settings.get("trainable_token_indices") or {}),
        )

    def kept_by_torch(self, readers: Readers) -> int:
        """What A reads, which layers share unless it went through dropout, which keeps a mask too.

        Beside a bfloat16 model it is a float32 copy for each layer. What B reads is kept as well, unless all is folded
        into the weight, which happens in float32 only.
        """
        folded = self.low_rank and readers.size == F32
        small = 0 if folded else sum(F32 * rank for _, rank, _ in readers.layers)
        if readers.dropped:
            return len(readers.layers) * 2 * F32 * readers.width + small
        if readers.size != F32:
            return len(readers.layers) * F32 * readers.width + small
        return small + (0 if readers.alive else F32 * readers.width)

    def kept_by_reference(self, name: str, outputs: int, inputs: int, rank: int) -> int:
        """What B reads."""
        return rank
