"""The five criteria and their companions: the title of each, and how a verdict on one is made."""

from finetune.data.overlap import FEWEST_LEFT
from finetune.records import Outcome, Verdict

NOT_MEASURED = "not measured"
TITLES = (
    {
        "loss-convergence": "Training loss falls",
        "loss-fixed-batches": "Loss on fixed batches falls (eval mode)",
        "loss-start": "Initial loss is plausible",
        "loss-held-out": "Validation loss falls",
    },
    {
        "model-learning": "Answers improve",
        "learning-signed": "More improve than get worse",
        "learning-control": "Beats a control trained on shuffled answers",
        "learning-retention": "No forgetting (retention questions)",
        "preference-rows": "Chosen answers gained on rejected ones, in its pairs",
        "preference-unseen": "Chosen answers gained on rejected ones, in unseen pairs",
        "preference-control": "Gained more than a control trained on flipped pairs",
        "preference-chosen": "Chosen answers stay as likely as they were",
        "claim-rows": "It learned its rows",
        "claim-unseen": "Unseen rows of the kind got likelier",
        "claim-association": "So did each unseen prompt's own answer, above others'",
        "claim-retention": "It still knows and does what the base did",
        "claim-ends": "Its answers end by themselves",
        "claim-recites": "It does not recite its rows",
    },
    {
        "memory-efficiency": "LoRA needs less memory than full fine-tuning",
        "memory-exact": "Gradient and optimizer memory shrinks",
        "memory-resident": "Process memory (RSS) shrinks",
    },
    {
        "parameter-updates": "Adapter tensors change",
        "parameter-exactly": "Nothing else changes",
        "parameter-first-step": "LoRA init correct: grad(B) != 0, grad(A) = 0 at step 1",
    },
    {
        "artifacts": "Files are written",
        "artifacts-no-strays": "No stray files",
        "artifacts-reload": "The adapter reloads in a new process",
    },
)
"""By criterion, the first being number 1: the strategy's own reading, then its companions."""


def verdict(
    key: str, outcome: Outcome, measured: str, allowed: str, reason: str = "", *, title: str = "", **numbers: float
) -> Verdict:
    """The verdict with this id; `title` where it is not the usual one, `numbers` as they were measured."""
    number, titles = next((number, titles) for number, titles in enumerate(TITLES, start=1) if key in titles)
    companion = key != next(iter(titles))
    return Verdict(key, title or titles[key], number, outcome, measured, allowed, reason, companion, numbers=numbers)


def too_few_left(left: int, trained: int, what: str) -> str:
    """Why rows are too few to judge by, since the others stand in training rows; "" where they are not."""
    if not trained or left >= FEWEST_LEFT:
        return ""
    stand = f"{trained} of the {what} stand in the rows trained on, whole or in part"
    return f"{stand}, and {left} that do not are too few to judge by"
