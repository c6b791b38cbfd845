"""Shapes of transformers as their files would show them, from a handful of sizes that no two of are alike."""

from dataclasses import dataclass, replace
from functools import cache

from hypothesis import strategies as st

from finetune.memory.framework import FRAMEWORKS
from finetune.memory.load import StepLoad
from finetune.records import AdapterTarget, LinearLayer, ModelShape
from finetune_strategies.picks import EITHER, between, pick

ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "other": "OtherForCausalLM"}


@dataclass(frozen=True)
class Sizes:
    """What a family's config says."""

    kind: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    tied: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """One block's linear layers: (outputs, inputs), GPT-2's the other way round."""
        h, i, q, k = self.hidden, self.inner, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.kind == "gpt2":
            return {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, i), "mlp.c_proj": (i, h)}
        attention = {"q_proj": (q, h), "k_proj": (k, h), "v_proj": (k, h), "o_proj": (h, q)}
        return {**attention, "gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}

    @property
    def shape(self) -> ModelShape:
        """The model's shape; two norms a block and a last one, a table in and a table out."""
        layers = tuple(
            LinearLayer(f"model.layers.{block}.{name}", sides)
            for block in range(self.layers)
            for name, sides in self.matrices.items()
        )
        linear = sum(rows * columns for rows, columns in (layer.shape for layer in layers))
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return ModelShape(
            ARCHITECTURES[self.kind],
            linear + tables + (2 * self.layers + 1) * self.hidden,
            self.vocab,
            self.hidden,
            self.layers,
            64,
            layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.inner,
            tied_head=self.tied,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.hidden_dropout,
        )

    def names(self) -> tuple[str, ...]:
        """The short names of the linear layers."""
        return tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.matrices))


@dataclass(frozen=True)
class Job:
    """One training step of one method on one model."""

    sizes: Sizes
    target: AdapterTarget | None
    dtype: str
    load: StepLoad
    backend: str


@st.composite
def sizes(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(ARCHITECTURES)) -> Sizes:
    """Sizes without a common factor; GPT-2's heads are as wide as the model, and each has a key head of its own."""
    kind = draw(pick(*kinds))
    heads, kv_heads = draw(pick((3, 1), (6, 2), (6, 3), (5, 5), (1, 1)))
    head_dim = draw(pick(2, 4, 10))
    if kind == "gpt2":
        kv_heads = heads
    return Sizes(
        kind,
        hidden=heads * head_dim if kind == "gpt2" else draw(pick(7, 11, 23, 47)),
        inner=draw(pick(5, 13, 29, 101)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=draw(between(1, 4)),
        vocab=draw(pick(3, 61, 997)),
        tied=draw(EITHER),
        attention_dropout=draw(pick(0.0, 0.1)),
        hidden_dropout=draw(pick(0.0, 0.1)),
    )


@st.composite
def loads(draw: st.DrawFn) -> StepLoad:
    """Batches of a few rows; from one trained token a row to all of them."""
    rows, length = draw(between(1, 9)), draw(between(2, 50))
    return StepLoad(
        rows,
        length,
        draw(between(rows, rows * (length - 1))),
        masked=rows > 1 and draw(EITHER),
        accumulation=draw(pick(1, 1, 3)),
    )


@st.composite
def jobs(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(ARCHITECTURES)) -> Job:
    """Any model, method, format, batch and backend; the reference backend has no dropout in the model itself."""
    model = draw(sizes(kinds))
    backend = draw(pick(*sorted(FRAMEWORKS)))
    if backend == "reference":
        model = replace(model, attention_dropout=0.0, hidden_dropout=0.0)
    target, dtype = draw(_targets(model.names())), draw(pick("float32", "bfloat16"))
    return Job(model, target, dtype, draw(_LOADS), backend)


_LOADS = loads()


@cache
def _targets(names: tuple[str, ...]) -> st.SearchStrategy[AdapterTarget | None]:
    modules = st.lists(st.sampled_from(names), min_size=1, unique=True).map(tuple)
    target = st.builds(AdapterTarget, st.integers(1, 9), st.just(16.0), st.sampled_from([0.0, 0.1]), modules)
    return st.none() | target
