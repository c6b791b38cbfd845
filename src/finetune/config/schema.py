"""What a training configuration may say: small frozen groups of settings, unknown keys refused.

Each field carries one sentence in a user's words; `ft init`, `ft schema` and the error messages are made from it.
`None` in a field that may be derived means "work it out"; `finetune.config.resolve` does.
"""

from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    model_validator,
)

from finetune.abilities import ABILITIES
from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.records import DEFAULT_KIND, Quantization


def _refuse_boolean(value: object) -> object:
    """Python counts True as 1; in a configuration that is always a slip."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _require_a_day(text: str) -> str:
    date.fromisoformat(text)
    return text


def _refuse_the_word_none(value: str) -> str:
    """Python's None written as text would become a path called "None"."""
    if value == "None":
        raise ValueError("write null for no value")
    return value


def _refuse_repetition(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("name each one once")
    return values


_NotBoolean = BeforeValidator(_refuse_boolean)

# Control characters and line breaks: never meant in a name or path, and trouble in logs and YAML.
_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029"

Count = Annotated[int, Field(ge=1), _NotBoolean]
CountOrZero = Annotated[int, Field(ge=0), _NotBoolean]
Length = Annotated[int, Field(ge=8), _NotBoolean]
# The widest range that NumPy's and every framework's seeding accepts.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), _NotBoolean]
Positive = Annotated[float, Field(gt=0), _NotBoolean]
PositiveOrZero = Annotated[float, Field(ge=0), _NotBoolean]
Share = Annotated[float, Field(ge=0, lt=1), _NotBoolean]
Text = Annotated[
    str,
    Field(min_length=1, pattern=r"^[^" + _UNPRINTABLE + r"]+$", json_schema_extra={"not": {"const": "None"}}),
    AfterValidator(_refuse_the_word_none),
]
TemplatePath = Annotated[str, Field(pattern=r"^[^" + _UNPRINTABLE + r"]+\.jinja$")]
Day = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), AfterValidator(_require_a_day)]
DAY = date(2024, 7, 26)
"""The day that a template prints where none is set: what Llama 3's print by themselves where they cannot ask."""
TemplateName = Literal["auto", "tokenizer", "alpaca", "chatml", "llama2", "llama3"]
Names = Annotated[tuple[Text, ...], Field(min_length=1)]
Weights = Annotated[tuple[Positive, ...], Field(min_length=1)]
_Mapping = Field(min_length=1, json_schema_extra={"additionalProperties": False})
_Variable = StrictBool | StrictInt | StrictFloat | Text
TemplateVariables = Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], _Variable], _Mapping]
_FIELDS = (
    "messages|prompt|completion|instruction|input|output|text|chosen|rejected|system|history|tools|reasoning|train"
)
Columns = Annotated[dict[Annotated[str, Field(pattern=rf"^({_FIELDS})$")], Text], _Mapping]
NewTokens = Annotated[tuple[Annotated[Text, Field(max_length=128)], ...], Field(max_length=1000)]
RankPattern = Annotated[dict[Text, Count], _Mapping]
AlphaPattern = Annotated[dict[Text, Positive], _Mapping]
Trackers = Annotated[
    tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...],
    Field(json_schema_extra={"uniqueItems": True}),
    AfterValidator(_refuse_repetition),
]
if TYPE_CHECKING:
    TrainedKind = str
else:
    TrainedKind = Literal[(*ADAPTER_KINDS, "full")]
ExtraRuns = Literal["auto", "always", "never"]


class Spec(BaseModel):
    """A frozen group of settings; unknown keys, NaN and infinity are refused."""

    # Built at first use, so that importing stays fast.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True, use_attribute_docstrings=True
    )


Goal = Literal["auto", "rows", "style", "generalise"]


class ModelSpec(Spec):
    """Which model is fine-tuned."""

    path: Text = "reference-llama"
    """The model to fine-tune: the name of a shipped model, a local folder or a Hugging Face Hub id."""
    revision: Text | None = None
    """Which branch, tag or commit of a Hub model to take; null takes the Hub's default."""
    adapter: Text | None = None
    """The adapter to go on from: a finished run, or a folder that PEFT or mlx-lm saved one in. `path` may name it as
    well: its base is then the one that it names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The number format the weights are held in; bfloat16 halves their memory."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the model computes: auto takes a GPU where the backend sees one, and the processor elsewhere; gpu
    refuses to run where there is none."""
    quantize: Literal["4bit", "8bit", "fp4"] | None = None
    """How to quantise the base's matrices as they are loaded, for an adapter on top (QLoRA): with mlx as mlx-lm does
    it; with torch by bitsandbytes (extra `bitsandbytes`), where 4bit is its NF4, fp4 its FP4 and 8bit its int8. null
    leaves the base as its files have it, full or quantised by mlx-lm."""
    quantize_group_size: Literal[32, 64, 128] = 64
    """How many quantised numbers of a row share a scale; fewer are closer to the full model and take more memory. torch
    has 64 alone, and in 8bit one scale for each row."""


class DataSpec(Spec):
    """What is learned, what is held out, and what must not be forgotten."""

    train: Text | Names | None = None
    """The training rows: a file (.jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow; text also as .gz, .bz2,
    .xz, .zst), a folder, a pattern such as `data/*.jsonl`, OWNER/NAME of a set on the hub, or a list of several. A
    folder's or a set's part `train` is trained on and its part `valid` held out; `NAME:PART` takes another part,
    `OWNER/NAME@REVISION:SUBSET:PART` one of the hub. null takes the shipped data set."""
    mix: Weights | None = None
    """How much each source of data.train counts in a mixture, such as `[3, 1]` for two: three rows of the first for
    each of the second, as many as there can be without one twice, chosen by training.seed. null takes all rows."""
    valid: Text | Names | None = None
    """Rows to measure the loss on, less those that stand in training rows; null splits them off the training rows."""
    valid_fraction: Share | None = None
    """The share of training rows to hold out; null means 0.05, or none from fewer than 200 rows."""
    rehearsal: Text | Names | None = None
    """Rows mixed into training so that the model keeps what it knew; they never count as learning."""
    retention: Text | Names | None = None
    """Questions whose answers the model must keep; they are asked before and after training."""
    limit: Count | None = None
    """Use only this many training rows; null uses them all."""
    columns: Columns | None = None
    """Which column is what, where names do not say it, such as `{prompt: question, completion: answer}`; for messages,
    prompt, completion, instruction, input, output, text, chosen, rejected, system, history, tools, reasoning, and for
    train, a column that says of each row whether it is learned. null goes by the names."""
    ignore_columns: Names | None = None
    """Columns that are not read, whatever they say, such as `[label]`; also keys of messages, as `[messages.mood]`."""


class TemplateSpec(Spec):
    """How a row becomes text; `template: chatml` is short for `template: {name: chatml}`."""

    name: TemplateName | TemplatePath = "auto"
    """The prompt template; auto takes the tokenizer's own if it has one and alpaca otherwise."""
    date: Day = DAY.isoformat()
    """The day that a template prints which asks for today's, as Llama 3's do: the same in every run, and recorded."""
    variables: TemplateVariables | None = None
    """Variables that the template reads, such as `{enable_thinking: false}`; set in what is saved and served, too."""
    train_on: Literal["all", "last", "everything"] = "all"
    """Learn all answers of a conversation, the last alone (for templates that show earlier ones otherwise), or
    everything, prompts too; what a row says of itself or of a message (`weight`, `train`) counts before it."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TokenSpec(Spec):
    """How text becomes tokens."""

    max_length: Length | None = None
    """The most tokens one row may have; null means what the model can read, at most 2048."""
    truncation: Literal["drop", "truncate_prompt", "split", "refuse"] = "drop"
    """What happens to a longer row: left out, its prompt cut so that the whole answer stays, plain text split into
    pieces, or the run refused."""
    cache: Text | None = None
    """A folder to keep token ids in between runs over the same rows; null keeps none."""
    add_special_tokens: NewTokens = ()
    """Special tokens to learn, such as `["[CALL]", "[END]"]`: those that the tokenizer lacks are added, and
    the rows of all of them in the embedding and the output head are trained beside the adapter; other rows stay as they
    are. Programs leave special tokens out of the text that they show."""
    add_tokens: NewTokens = ()
    """The same for tokens that programs are to show, such as `["<tool>", "</tool>"]`."""

    @property
    def learned(self) -> tuple[str, ...]:
        """All tokens that are to be learned."""
        return self.add_special_tokens + self.add_tokens


class AdapterSpec(Spec):
    """What is trained: an adapter, or the whole model."""

    kind: TrainedKind = Field(
        default=DEFAULT_KIND,
        description=f"What is trained: {', '.join(kind.about for kind in ADAPTER_KINDS.values())}, or the full model "
        "and no adapter.",
    )
    rank: Count = 8
    """The adapter's rank: a higher one learns more and takes more memory."""
    alpha: Positive = 16.0
    """How strongly the adapter acts: its output is scaled by alpha / rank."""
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    """What scales the adapter's output: alpha / rank, or alpha / sqrt(rank), which is called rsLoRA and lets high
    ranks learn as fast as low ones."""
    dropout: Share = 0.0
    """The share of adapter inputs switched off at random while training."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Which layers get an adapter: all linear ones but the routers of experts, or a list of layer names."""
    rank_pattern: RankPattern | None = None
    """Ranks of some layers' own: a regular expression for the end of a layer's path, and the rank; the first that
    fits counts."""
    alpha_pattern: AlphaPattern | None = None
    """Alphas of some layers' own, by pattern as in rank_pattern."""
    modules_to_save: Names | None = None
    """Modules that are trained whole and saved beside the adapter, such as lm_head; null for none."""


class TrainingSpec(Spec):
    """What is minimised, and how long and how fast is trained."""

    objective: Literal["sft", "dpo"] = "sft"
    """What a step minimises: the loss of the answers that rows show (sft), or that of preferring the chosen of two
    answers to the rejected one (dpo), for rows with `chosen` and `rejected`."""
    dpo_beta: Positive = 0.1
    """How closely dpo stays to the model as it began: lower lets it move further from there."""

    epochs: Positive | None = None
    """How many times the training rows are gone through; null means 3, up to 10 where they make few steps, and
    fewer where more than 25,000 rows would be seen."""
    max_steps: Count | None = None
    """Stop after this many steps even if epochs remain."""
    batch_size: Count = 8
    """How many rows (with packing: sequences) go through the model at once."""
    processes: Count | None = None
    """How many processes share the work, each with a batch of its own; null means as many as a launcher has started."""
    gradient_accumulation_steps: Count = 1
    """How many batches are added up before the weights move once."""
    gradient_checkpointing: StrictBool = False
    """Keep only what goes into each block of the model and compute the rest of it again for the gradients, which are
    the same: much less memory, and about a third more time; torch and mlx."""
    packing: StrictBool = False
    """Let short rows share a sequence of up to tokens.max_length tokens, apart from each other."""
    learning_rate: Positive | None = None
    """How far the weights move per step, at its highest; null works it out from the model's size: for LoRA near 0.001
    at 0.1 B parameters and 0.0002 at 8 B, for a full model a tenth of it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes down after warm-up."""
    warmup_fraction: Share = 0.05
    """The share of the steps in which the learning rate rises from near zero."""
    loraplus_lr_ratio: Positive = 1.0
    """How many times faster B moves than A, which is called LoRA+; 1 moves all alike."""
    weight_decay: PositiveOrZero = 0.0
    """How strongly AdamW pulls trained matrices towards zero; norm and bias weights are excluded."""
    label_smoothing: Share = 0.0
    """The share of each trained token that is spread over all words, so that none is learned to certainty; for dpo the
    share of pairs that are taken to be the wrong way round. Held-out losses are measured without it."""
    max_grad_norm: Positive = 1.0
    """Gradients longer than this are shortened to it."""
    seed: Seed = 0
    """The number all randomness starts from: same seed, same run."""
    save_every: Count | None = None
    """Steps between checkpoints; null means about a tenth of the run, at least 10."""
    evaluate_every: Count | None = None
    """Steps between looks at the held-out loss; null means a tenth of the run."""
    early_stopping_patience: Count | None = None
    """Stop when the held-out loss has not improved for this many looks in a row; null never does."""
    early_stopping_min_delta: PositiveOrZero = 0.0
    """By how many nats per token the held-out loss must fall to count as improved."""
    load_best_model: StrictBool = False
    """End the run with the weights of the lowest held-out loss; false keeps those of the last step."""


class EvaluationSpec(Spec):
    """What the model is asked before and after training."""

    questions: CountOrZero = 64
    """How many trained questions are asked before and after training."""
    retention_questions: CountOrZero = 64
    """How many questions the model must keep are asked before and after training."""
    max_new_tokens: Count = 32
    """The most tokens one answer may have."""


class JudgeSpec(Spec):
    """What the fine-tuning is for, and which extra runs are made as evidence that it worked."""

    answers: Literal["auto", "exact", "open"] = "auto"
    """Whether an answer has one right wording (exact) or many (open); auto looks at their length and repetition."""
    goal: Goal = "auto"
    """What open answers must show: that the rows were learned; also that unseen rows of the kind got likelier (style);
    also that each unseen prompt's own answer did (generalise). auto takes style where enough unseen rows are held
    out, and rows elsewhere."""
    budget: Positive = 0.3
    """What judging may cost, as a share of the training's computing; fewer rows are asked, and what auto leaves open
    is shortened or left out, to stay within it. Some forty seconds' worth is always allowed."""
    control: ExtraRuns = "auto"
    """Train once more for comparison, on shuffled answers or on pairs changed round; auto takes as many steps as
    judge.budget allows, always as many as the training itself."""
    memory: ExtraRuns = "auto"
    """Measure LoRA's memory against full fine-tuning; auto does so where judge.budget allows it."""
    memory_batch_size: Count = 4
    """How many rows per batch the memory measurement uses."""
    memory_length: Length = 64
    """How many tokens per row the memory measurement uses."""
    allow_inconclusive: StrictBool = False
    """End with exit code 0, not 4, when the outcome is inconclusive."""


class TrackingSpec(Spec):
    """Where to log metrics while the run goes; `events.jsonl` in the run folder always is."""

    to: Trackers = ()
    """The trackers to tell: a list of tensorboard, trackio, wandb, mlflow; empty for none."""
    project: Text = "finetune"
    """The project (in MLflow: experiment) that runs belong to."""
    name: Text | None = None
    """What the run is called there; null takes the name of the run folder."""


class TrainingConfig(Spec):
    """Everything a fine-tuning run can be told."""

    model: ModelSpec = Field(default_factory=ModelSpec)
    data: DataSpec = Field(default_factory=DataSpec)
    template: TemplateSpec = Field(default_factory=TemplateSpec)
    tokens: TokenSpec = Field(default_factory=TokenSpec)
    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    judge: JudgeSpec = Field(default_factory=JudgeSpec)
    tracking: TrackingSpec = Field(default_factory=TrackingSpec)
    backend: Literal["torch", "mlx", "reference"] = "torch"
    """Which framework does the computing."""

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantised as it is loaded: by the backend's own scheme; None also where it has none."""
        asked = self.model.quantize
        scheme = ABILITIES[self.backend].schemes.get(asked or "")
        bits = 8 if asked == "8bit" else 4
        return Quantization(bits, self.model.quantize_group_size, scheme) if scheme else None
