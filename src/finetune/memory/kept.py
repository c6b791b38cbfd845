"""Counts what a step keeps for its backward pass with torch, tensor by tensor, from the model's shape.

Letters: h hidden size, i inner size of the MLP, q width of all query heads, k width of all key heads, n length, r rank;
c bytes of the model's own numbers, 4 those of float32. All counts are bytes per token unless they say otherwise.

Source: what `torch.autograd.graph.saved_tensors_hooks` sees of transformers 5.23's Llama and GPT-2 and of PEFT 0.21,
with SDPA attention on the CPU; each term below is one tensor that it showed.
"""

from dataclasses import dataclass, replace

from finetune.adapters.kind import F32, Readers
from finetune.adapters.kinds import kind_of
from finetune.memory.estimate import BYTES, sides
from finetune.memory.load import StepLoad
from finetune.records import AdapterTarget, LinearLayer, ModelShape

SLICE_BYTES = 1 << 26
"""The most that the logits of a slice of tokens take in float32, where torch takes the loss slice by slice; a slice
holds a whole token at least."""
_INDEX = 8
_LLAMA_BLOCKS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
_GPT2_BLOCKS = {"GPT2LMHeadModel"}
KNOWN = _LLAMA_BLOCKS | _GPT2_BLOCKS
"""Architectures whose blocks are counted tensor by tensor; any other gets the general formula and a wide band."""


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes that live through a part of a step.

    `blocks` is kept by all blocks together, `first_block` by the one nearest the input, `outside` by what stands
    around them; `logits` is alive when the loss is differentiated; `brief` comes and goes while one block is.
    """

    blocks: int
    first_block: int
    outside: int
    logits: int
    brief: int

    @property
    def activations(self) -> int:
        """What waits for the backward pass."""
        return self.blocks + self.outside


def kept_by_torch(shape: ModelShape, target: AdapterTarget | None, dtype: str, load: StepLoad) -> ActivationBytes:
    """What one step keeps with torch; `target` is None for full fine-tuning."""
    step = _Step(shape, target, BYTES[dtype], load)
    if shape.architecture in KNOWN:
        block = step.gpt2_block if shape.architecture in _GPT2_BLOCKS else step.llama_block
        # A frozen embedding passes no gradient on, so the first block keeps less than the others.
        first = block(grad=step.full or step.rows > 0 or step.saves("embed_tokens", "wte", "wpe"))
        blocks = first + block(grad=True) * max(0, shape.layers - 1)
    else:
        blocks = step.any_blocks()
        first = blocks // max(1, shape.layers)
    kept = ActivationBytes(
        blocks=load.tokens * blocks,
        first_block=load.tokens * first,
        outside=step.outside(),
        logits=step.logits(),
        brief=max(step.brief(), step.brief_in_adapter()),
    )
    return step.recomputed(kept) if load.recomputed else kept


def mean_rank(shape: ModelShape, target: AdapterTarget, module: str) -> int:
    """The rank of the adapters on layers of one name, on average over the blocks, rounded up."""
    ranks = [target.rank_of(layer.name) for layer in shape.linear_layers if layer.name.rsplit(".", 1)[-1] == module]
    return -(-sum(ranks) // len(ranks)) if ranks else target.rank


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of one method on one model; `size` is c."""

    shape: ModelShape
    target: AdapterTarget | None
    size: int
    load: StepLoad

    @property
    def full(self) -> bool:
        return self.target is None

    @property
    def rows(self) -> int:
        """How many rows of the tables are trained."""
        return max(map(len, self.target.rows.values()), default=0) if self.target else 0

    @property
    def queries(self) -> int:
        return self.shape.heads * self.shape.head_dim

    def saves(self, *modules: str) -> bool:
        saved = self.target.saved if self.target else ()
        return any(path.rsplit(".", 1)[-1] in modules for path in saved)

    def trains(self, *modules: str) -> bool:
        return self.target is None or any(module in self.target.names for module in modules)

    def inputs(self, width: int, *modules: str, alive: bool = False) -> int:
        """What linear layers that all read one tensor of `width` keep; `alive`: that tensor is kept by another anyway.

        A frozen linear layer keeps nothing; what an adapter keeps, its kind says.
        """
        if self.target is None:
            return 0 if alive else self.size * width
        hit = [module for module in modules if module in self.target.names]
        layers = tuple((name, mean_rank(self.shape, self.target, name), self.written(name)) for name in hit)
        if not layers:
            return 0
        readers = Readers(width, layers, self.size, self.target.dropout > 0, alive)
        return kind_of(self.target).kept_by_torch(readers)

    def written(self, module: str) -> int:
        """How many numbers the layers of one name write for each token, on average over the blocks."""
        layers = [layer for layer in self.shape.linear_layers if layer.name.endswith(f".{module}")]
        return sum(sides(self.shape, layer)[0] for layer in layers) // max(1, len(layers))

    def adapted(self) -> list[LinearLayer]:
        return [layer for layer in self.shape.linear_layers if self.trains(layer.name.rsplit(".", 1)[-1])]

    def brief_in_adapter(self) -> int:
        """What comes and goes while one layer's weight is looked at, in bytes."""
        if self.target is None:
            return 0
        return max(kind_of(self.target).brief_by_torch(*sides(self.shape, layer)) for layer in self.adapted())

    def attention(self, *, keys: int) -> int:
        """Queries, keys, values, the output and its log-sum; with dropout in it, the whole table of weights instead.

        CPU attention keeps no table of weights by itself. Dropout makes it: weights, mask and product, each heads x n,
        beside copies of queries, keys and values, all in float32; the output is then kept by whoever reads it.
        """
        if self.shape.attention_dropout > 0:
            return F32 * (3 * self.queries + 3 * self.shape.heads * self.load.length)
        mask = self.size * self.load.length if self.load.masked else 0
        return self.size * 2 * (self.queries + keys) + F32 * self.shape.heads + mask

    def llama_block(self, *, grad: bool) -> int:
        """Llama, Mistral, Qwen2; `grad` says whether a gradient is wanted of the block's input."""
        h, i = self.shape.hidden_size, self.shape.intermediate_size
        # Under a mask keys and values are repeated for every query head, and kept so.
        keys = self.queries if self.load.masked else self.shape.kv_heads * self.shape.head_dim
        kept = self.rms_norm() if grad else 0
        kept += self.inputs(h, "q_proj", "k_proj", "v_proj")
        grad = grad or self.trains("q_proj", "k_proj", "v_proj")
        kept += self.attention(keys=keys) if grad else 0
        kept += self.inputs(self.queries, "o_proj", alive=grad and self.shape.attention_dropout == 0)
        grad = grad or self.trains("o_proj")
        kept += self.rms_norm() if grad else 0
        kept += self.inputs(h, "gate_proj", "up_proj")
        grad = grad or self.trains("gate_proj", "up_proj")
        kept += 3 * i * self.size if grad else 0  # gate, silu(gate) and up
        return kept + self.inputs(i, "down_proj")

    def rms_norm(self) -> int:
        """Its input and a factor in float32; to train its gain, the normalised input too."""
        h = self.shape.hidden_size
        return F32 * (h + 1) + (self.size * h if self.full else 0)

    def gpt2_block(self, *, grad: bool) -> int:
        """GPT-2; `grad` says whether a gradient is wanted of the block's input."""
        h, i = self.shape.hidden_size, self.shape.intermediate_size
        dropped = self.size * h if self.shape.hidden_dropout > 0 else 0
        kept = self.layer_norm() if grad else 0
        kept += self.inputs(h, "c_attn")
        grad = grad or self.trains("c_attn")
        kept += self.attention(keys=self.queries) if grad else 0
        kept += self.inputs(h, "c_proj", alive=grad and self.shape.attention_dropout == 0)
        grad = grad or self.trains("c_proj")
        kept += dropped + self.layer_norm() if grad else 0
        kept += self.inputs(h, "c_fc")
        grad = grad or self.trains("c_fc")
        kept += i * self.size if grad else 0  # what the fused GELU reads
        kept += self.inputs(i, "c_proj")
        return kept + (dropped if grad or self.trains("c_proj") else 0)

    def layer_norm(self) -> int:
        return self.size * (self.shape.hidden_size + 2)

    def any_blocks(self) -> int:
        """All blocks of any transformer: what each linear layer reads and writes, as if kept once each.

        The rest of a block keeps about as much as its linear layers share, in the two families that are counted.
        """
        kept = self.size * sum(sum(layer.shape) for layer in self.shape.linear_layers)
        if self.shape.attention_dropout > 0:
            kept += 3 * F32 * self.shape.heads * self.load.length * self.shape.layers
        if self.load.masked:
            kept += self.size * self.load.length * self.shape.layers
        if self.target is None:
            return kept
        for layer in self.adapted():
            known = (layer.name, self.target.rank_of(layer.name), sides(self.shape, layer)[0])
            readers = Readers(max(layer.shape), (known,), self.size, self.target.dropout > 0, alive=True)
            kept += kind_of(self.target).kept_by_torch(readers)
        return kept

    def recomputed(self, kept: ActivationBytes) -> ActivationBytes:
        """The same where each block keeps its input alone, and what else it keeps comes and goes in its turn.

        When gradients have passed through its MLP, what that kept is gone again.
        """
        blocks, i, tokens = max(1, self.shape.layers), self.shape.intermediate_size, self.load.tokens
        entry = tokens * self.size * self.shape.hidden_size
        again = -(-(kept.blocks - kept.first_block) // (blocks - 1)) if blocks > 1 else kept.first_block
        gpt2 = self.shape.architecture in _GPT2_BLOCKS
        in_mlp = (1 if gpt2 else 3) * i * self.size + self.inputs(i, "c_proj" if gpt2 else "down_proj")
        brief = max(
            kept.brief,
            again + max(self.brief_in_mlp(gpt2=gpt2), self.brief_in_adapter()),
            again + tokens * (self.brief_elsewhere(gpt2=gpt2) - in_mlp),
        )
        return replace(kept, blocks=blocks * entry, first_block=entry, brief=brief)

    def outside(self) -> int:
        """The final norm, the hidden states that get logits, ids and marks, RoPE's angles; in bytes of the step."""
        h, tokens = self.shape.hidden_size, self.load.tokens
        gpt2 = self.shape.architecture in _GPT2_BLOCKS
        kept = tokens * (self.layer_norm() if gpt2 else self.rms_norm()) + _INDEX * self.load.targets + tokens
        if not gpt2:
            kept += 2 * self.size * self.load.length * self.shape.head_dim
        if self.target and kind_of(self.target).copies_weight(size=self.size, dropped=self.target.dropout > 0):
            kept += F32 * sum(layer.shape[0] * layer.shape[1] for layer in self.adapted())
        if self.saves("lm_head"):
            kept += self.size * h * self.load.targets
        if self.rows:  # what the head reads, and the table that its rows were put into
            kept += self.size * h * (self.load.targets + self.shape.vocab_size) + _INDEX * tokens
        if self.full:
            kept += self.size * h * self.load.targets + _INDEX * tokens
            kept += self.size * h * tokens if self.shape.hidden_dropout > 0 else 0
        return kept

    def logits(self) -> int:
        """What the loss takes for itself, in bytes of the step.

        Where the head is trained, or not known to be plain: log-probabilities, the gradient of the loss by them and
        that by the logits, all three in float32. Before a frozen head: the logits of a slice of tokens, in the
        model's format and in float32, the hidden states and their gradient.
        """
        words = self.shape.vocab_size
        own = self.full or self.rows or (self.target and "lm_head" in self.target.saved)
        if own or self.shape.architecture not in KNOWN:
            return 3 * F32 * self.load.targets * words
        at_once = min(F32 * words * self.load.targets, max(SLICE_BYTES, F32 * words))
        narrow = at_once * self.size // F32 if self.size != F32 else 0
        return at_once + narrow + 2 * self.load.targets * self.shape.hidden_size * self.size

    def brief(self) -> int:
        """What comes and goes while gradients pass through a block or the final norm, in bytes of the step.

        The widest of three places: the MLP, an RMSNorm with five tensors in float32 beside what it keeps, or, where
        attention drops out, one more table, when what the MLP kept is gone.
        """
        gpt2 = self.shape.architecture in _GPT2_BLOCKS
        return max(self.brief_in_mlp(gpt2=gpt2), self.load.tokens * self.brief_elsewhere(gpt2=gpt2))

    def brief_elsewhere(self, *, gpt2: bool) -> int:
        """The same outside the MLP, per token."""
        h, i = self.shape.hidden_size, self.shape.intermediate_size
        norm = 0 if gpt2 else self.rms_norm() + 5 * F32 * h
        table = F32 * self.shape.heads * self.load.length + (h - i) * self.size
        return max(norm, table if self.shape.attention_dropout > 0 else 0)

    def brief_in_mlp(self, *, gpt2: bool) -> int:
        """Gradients as wide as the inner tensor, of gate and up or of base and adapter, in bytes of the step.

        An adapter that is folded into its weight makes no gradient of its own that wide, but that weight once more,
        and then two tensors as wide as its rank.
        """
        h, i, tokens = self.shape.hidden_size, self.shape.intermediate_size, self.load.tokens
        through = tokens * self.size * (i + h)
        gated = tokens * self.size * (2 * i + h)
        if self.target is None:
            return through if gpt2 else gated
        most = max([self.target.rank, *self.target.rank_pattern.values()])
        # What is packed is made whole for one product.
        whole = self.size * h * i if self.shape.quantized else 0
        if self.target.dropout > 0 or self.size != F32 or not kind_of(self.target).low_rank:
            # Where the MLP is gated, the adapter's stands there before and after dropout's mask.
            masked = i if self.target.dropout > 0 and not gpt2 else 0
            return through + tokens * F32 * (i + masked + most) + whole
        folded = max(F32 * h * i, 2 * F32 * most * tokens)
        out = "c_proj" if gpt2 else "down_proj"
        return max(through + (folded if self.trains(out) else whole), 0 if gpt2 else gated)
