"""What columns are called in public files: by what they hold, and those that say what is to be learned."""

import re
from collections.abc import Mapping

SHAPES: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "chat": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The shapes that rows have, and the fields without which each is none."""
PAIR_FIELDS = ("chosen", "rejected", "prompt", "input", "system", "history", "tools", "train")
"""What `data.columns` can name of pairs."""
SIDES: Mapping[str, tuple[str, ...]] = {
    "chosen": ("chosen", "preferred", "response_j"),
    "rejected": ("rejected", "dispreferred", "response_k"),
}
"""What the columns of a good and of a bad answer are called, or have in their name as a word."""
QUESTIONS = (
    *("prompt", "instruction", "question", "query", "input", "inputs", "user", "human", "problem", "definition"),
)
"""What columns, and keys of a turn that is a pair, are called which ask."""
ANSWERS = (
    *("completion", "output", "outputs", "answer", "answers", "response", "assistant", "gpt", "bot", "reply", "target"),
    *("targets", "solution"),
)
ANSWERS_OF_TEXTS = (*ANSWERS, "summary", "highlights", "headline", "code", "translation")
"""What columns are called beside a `text` that may be what it asks."""
CHOICES = (
    *("choices", "options", "endings", "option1", "option_1", "option_a", "opa", "sol1", "choice1", "choice_a"),
    *("answera", "answer_a", "mc1_targets"),
)
"""What columns are called that hold what an answer is chosen from."""
ROW_MARKS = ("weight", "train")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
SHAPE_OF = {each: shape for shape, fields in SHAPES.items() for each in fields}
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat", "contents")
BESIDE: Mapping[str, tuple[str, ...]] = {
    "system": (
        *("system", "system_prompt", "system_message", "system_instruction", "systeminstruction", "meta_instruction"),
    ),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "reasoning": (*THOUGHTS, "thought", "thoughts", "chain_of_thought", "cot", "complex_cot"),
}
VARIABLES = ("documents", "chat_template_kwargs")
JUDGEMENTS = (
    *("label", "labels", "kto_tag", "feedback", "desirable", "is_desirable", "good", "is_good", "correct"),
    *("is_correct", "accepted", "is_accepted", "approved", "preferred", "is_preferred", "liked", "thumbs_up", "keep"),
    *("chosen", "is_chosen", "selected"),
)
"""What columns are called that say of an answer whether it is a good one; the first three whatever they hold."""
CONDEMNATIONS = (
    *("rejected", "bad", "is_bad", "incorrect", "is_incorrect", "disliked", "thumbs_down", "flagged", "toxic"),
    *("skip", "exclude", "excluded", "drop", "deleted"),
)
"""What columns are called that say of an answer whether it is a bad one, where they say yes or no."""
MASKS = (
    *("loss_mask", "completion_mask", "assistant_mask", "assistant_masks", "train_mask", "label_mask", "loss_weight"),
    *("loss_weights", "sample_weight", "sample_weights", "weights", "completions", "winner", "preference"),
    *("better_response_id", "safer_response_id"),
)
"""What columns are called that say of a row's parts, or of several answers, what is to be learned."""
MEDIA = (
    *("image", "images", "image_url", "image_path", "audio", "audios", "video", "videos", "pixel_values"),
    *("input_features", "speech"),
)
"""What columns are called that hold no text."""
SCORES = (
    *("score", "scores", "rating", "ratings", "reward", "rewards", "quality", "rank", "upvotes", "loss"),
    *("overall_score", "helpfulness", "correctness"),
)
KNOWN = {
    *(*SHAPE_OF, *SIDES, *CHATS, *QUESTIONS, *ANSWERS, *(name for names in BESIDE.values() for name in names)),
    *(*JUDGEMENTS, *CONDEMNATIONS, *MASKS, *MEDIA),
}
LABELS_OF_ROWS = {
    *("id", "idx", "index", "uuid", "source", "category", "subcategory", "type", "lang", "language", "url", "date"),
    *("split", "subset", "subject", "topic", "sub", "level", "difficulty", "role", "path", "license", "model", "task"),
    *("hash", "timestamp", "state", "status", "kind", "no", "version", "author", "generator", "name"),
}
"""Words in the names of columns that say which row it is, and seldom hold what is asked or answered."""


def normal(name: str) -> str:
    """A column's name in small letters, its words joined by underscores."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def labels_rows(name: str) -> bool:
    """Whether a column's name says that it labels its row."""
    return bool(LABELS_OF_ROWS & {*re.split(r"[^a-z]+", normal(name))})
