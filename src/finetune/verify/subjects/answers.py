"""What the answers to questions look like, ability by ability; anything else is no answer.

Every question has `model`, the folder of a Hugging Face model, and `settings`, by the names that `ft schema` has; those
that are not given have the trainer's own defaults. A row is an object as data files have it. Ids are token ids. Weights
travel in safetensors files, an adapter's by the names that PEFT gives them in its files (`base_model.model.<layer>.
lora_A.weight`), in float32.

Folders of adapters are the trainer's own, in whatever format it has; `adapter_weights` says what is in one.
"""

from typing import Annotated, Unpack

from pydantic import BaseModel, ConfigDict, Field

Ids = list[int]
Count = Annotated[int, Field(ge=0)]


ANSWERS: dict[str, "type[Reply]"] = {}
"""Each ability, with what an answer to it looks like."""


class Reply(BaseModel):
    """What a trainer said, read strictly; numbers may be NaN, for laws to judge. `to`: the abilities it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init_subclass__(cls, to: tuple[str, ...] = (), **more: Unpack[ConfigDict]) -> None:
        super().__init_subclass__(**more)
        ANSWERS.update(dict.fromkeys(to, cls))


class RenderedText(Reply, to=("render", "render_served")):
    """`render`: the text that a conversation becomes."""

    text: str


class TokenRow(Reply):
    """One row as it is trained on; `targets` says of each token whether the model is taught to say it."""

    row: Count
    ids: Ids
    targets: list[bool]


class TokenRows(Reply, to=("tokenize", "tokenize_file")):
    """`tokenize`: rows as the trainer's own path from data to batches makes them; `dropped` counts the others by why.

    `tokenize_file` likewise, of the rows of a file or a folder; `row` is then the place of the row among them.

    A row that is cut into several comes several times, with the same `row`.
    """

    rows: list[TokenRow]
    dropped: dict[str, int] = Field(default_factory=dict)


class TokenIds(Reply, to=("prompt", "stops")):
    """`prompt`: the ids that a model is asked with; `stops`: those that end its answers."""

    ids: Ids


class Split(Reply, to=("split",)):
    """`split`: the rows that are trained on and those that are held out, by their numbers from 0."""

    train: list[Count]
    held_out: list[Count]


class UnseenRows(Reply, to=("unseen",)):
    """`unseen`: of the rows `valid`, by their numbers from 0, those that are measured beside the rows that are trained
    on, and those of them that count as unseen.
    """

    measured: list[Count]
    unseen: list[Count]


class Mixture(Reply, to=("mix",)):
    """`mix`: of each source of rows, given as `sources` in their order, those that are trained on, by their numbers."""

    rows: list[list[Count]]


class MicroBatch(Reply):
    """What goes through the model at once, padding and all; each list has a list for each sequence.

    `targets` says of each token whether a loss is taken at it (as the token to be predicted), `real` whether it is of a
    row and not padding. `positions` and `segments` where the model is given such: a token attends to its own segment.
    """

    ids: list[Ids]
    targets: list[list[bool]]
    real: list[list[bool]]
    positions: list[Ids] | None = None
    segments: list[Ids] | None = None


class OptimizerStep(Reply):
    """The micro-batches whose gradients are added up before the weights move once."""

    micro: list[MicroBatch]


class Epochs(Reply, to=("batches",)):
    """`batches`: the optimizer steps of each epoch, in order, exactly as training takes them."""

    epochs: list[list[OptimizerStep]]


class Loss(Reply, to=("loss", "packed_loss", "evaluate")):
    """`loss`: what the trainer reports for a batch, in nats a token; `count`: over how many, where it says so.

    `packed_loss` likewise, of sequences that several rows share.
    """

    loss: float
    count: Count | None = None


class BothLosses(Reply):
    """The loss of the base and of the tuned model on the same rows, in nats a token."""

    base: float
    tuned: float


class MeasuredTwice(Reply, to=("measure_file",)):
    """`measure_file`: what a run measured on its held-out rows `valid`, and what it says of a file of them later.

    Attributes:
        count: over how many tokens the file's losses are.
    """

    run: BothLosses
    file: BothLosses
    count: Count


class Gradient(Reply, to=("gradient",)):
    """`gradient`: the L2 norm of the gradient of each adapter tensor by the name that PEFT's files give it, for one
    optimizer step before clipping, and the loss that is reported for that step.
    """

    norms: dict[str, float]
    loss: float


class TrainedStep(Reply):
    """What is told of an optimizer step; what the trainer does not tell is null."""

    step: Annotated[int, Field(ge=1)]
    loss: float | None = None
    learning_rate: float | None = None


class TrainingResult(Reply, to=("train", "resume", "train_from", "train_pairs", "go_on", "lengthen")):
    """`train` and `resume`: the steps that were told, what is kept at which step, and where the adapter lies.

    `go_on` likewise, of a new run that trains a given adapter on: nothing is said of its shape, which it keeps.
    `lengthen` likewise, of a run that had come to its end, and is resumed to train for `epochs`.
    `train_pairs` likewise, of a run by sigmoid DPO on rows of `prompt`, `chosen` and `rejected`; with `adapter` it goes
    on from that one, and with `start` (of the oracle alone) from these weights.

    Attributes:
        adapter: the folder of the finished adapter, null when training was stopped before its end.
        checkpoints: those that can be gone on from, by their step.
        told: everything that was said in words.
    """

    steps: list[TrainedStep]
    adapter: str | None
    checkpoints: dict[str, str] = Field(default_factory=dict)
    told: str = ""


class Weights(Reply, to=("initial_adapter", "adapter_weights")):
    """`initial_adapter`, `adapter_weights`: the file of an adapter's weights, and what each B A is multiplied with."""

    file: str
    scale: float


class Logits(Reply, to=("logits", "logits_with")):
    """`logits`, `logits_with`: a file with the logits after each token of each prompt, (tokens, vocabulary), keyed
    "0", "1", ...
    """

    file: str


class Folder(Reply, to=("merge", "merge_as", "import_back")):
    """`merge`, `merge_as`: the model folder that was written; `import_back`: the one made of the model's GGUF file."""

    folder: str


class File(Reply, to=("export",)):
    """`export`: the file that was written."""

    file: str


class Generated(Reply, to=("generate",)):
    """`generate`: greedy continuations, without the prompt and without what ended them."""

    answers: list[Ids]


class Accepted(Reply, to=("configure", "load_config")):
    """`configure`: the trainer takes these settings; `told` is what it said about them."""

    told: str = ""
    effective: dict[str, object] = Field(default_factory=dict)


class TrainableNames(Reply, to=("trainable",)):
    """`trainable`: the tensors that training would change, by the names that PEFT's files give them."""

    names: list[str]


class ExportDescription(Reply, to=("describe_export",)):
    """`describe_export`: what a GGUF file is to hold, without the file.

    Attributes:
        metadata: its keys.
        file: every weight as the file has it, by the model's own names, in a safetensors file.
    """

    metadata: dict[str, object]
    file: str


class Planned(Reply, to=("plan_export",)):
    """`plan_export`: a GGUF file as it will be written: its keys, and the shape of each tensor by GGUF's name."""

    metadata: dict[str, object]
    tensors: dict[str, list[int]]


class Served(Reply, to=("serving",)):
    """`serving`: what is left for Ollama: the recipe's file, and the chat template in its language."""

    modelfile: str
    template: str


class Estimated(Reply, to=("estimate",)):
    """`estimate`: for LoRA how many numbers are trained, and the bytes of each part and in total, as expected."""

    trainable: Count
    parts: dict[str, Count]
    total: Count


class CheckpointsReply(Reply, to=("keep_checkpoints",)):
    """`keep_checkpoints`: for each order what was found, or why it was refused, and what is listed in the end.

    Attributes:
        found: of a checkpoint that was opened its content, of anything else "".
        refused: the words of what was refused, "" for what was done.
    """

    found: list[str]
    refused: list[str]
    listed: list[int]


class Content(Reply, to=("replace_file",)):
    """`replace_file`: what a file holds in the end, and whether it was said that it could not be written."""

    text: str
    refused: bool


class Done(Reply, to=("check_room", "change_setting")):
    """`check_room`, `change_setting`: there is nothing to say."""


class ProcessEnding(Reply, to=("run_process", "store_process")):
    """`run_process`, `store_process`: how a process ended; `stateful.lives.Ending` says what each part is."""

    code: int
    answer: str
    stderr: str
    changes: int | None


class RunFiles(Reply, to=("look",)):
    """`look`: what lies in a run's folder; `stateful.lives.Look` says what each part is."""

    begun: bool
    finished: bool
    checkpoints: dict[str, str]
    course: list[dict[str, object]]
    resumed: list[int]
    files: dict[str, str]
    names: list[str]
    record: dict[str, object]
    damaged: list[str]


class StoredCheckpoints(Reply, to=("list_checkpoints",)):
    """`list_checkpoints`: each step that is listed as complete, with what is wrong with it: "" for nothing."""

    checkpoints: dict[str, str]
