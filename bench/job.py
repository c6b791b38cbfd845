"""The jobs of the benchmark, the same for every trainer.

Training: a random 9.8 M-parameter Llama, 512 rows of 8 to 560 tokens. Data: 50,000 questions and answers in the
shipped Llama's own chat format, from a file to padded batches with labels.
"""

import argparse
import json
import random
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16
BATCH_SIZE = 8
LEARNING_RATE = 1e-4


def rows() -> list[list[int]]:
    """Token ids of every row: the same for every trainer."""
    rng = random.Random(0)
    return [[rng.randrange(3, 1024) for _ in range(rng.randint(8, 560))] for _ in range(512)]


def write_questions(path: Path, count: int) -> None:
    """Questions and answers of some words, as both trainers read them: prompt and completion, each a list of turns."""
    rng = random.Random(0)
    words = ("the", "capital", "of", "a", "country", "is", "known", "for", "its", "river", "12", "+", "30", "=", "42")

    def text(most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, completion = {"role": "user", "content": text(60)}, {"role": "assistant", "content": text(60)}
            file.write(json.dumps({"prompt": [prompt], "completion": [completion]}) + "\n")


def arguments() -> argparse.Namespace:
    """What a trainer's script is called with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0, help="how many steps are trained")
    parser.add_argument("--rows", type=Path, help="the file of questions to prepare")
    return parser.parse_args()


def tell(name: str, tokens: int, seconds: float, peak_rss: int, losses: list[float]) -> None:
    """Print what one trainer measured, as one JSON object on the last line."""
    print(json.dumps({"name": name, "tokens": tokens, "seconds": seconds, "peak_rss": peak_rss, "losses": losses}))


def tell_data(name: str, tokens: int, trained: int, seconds: tuple[float, float], peak_rss: int) -> None:
    """Print what one preparation measured: tokens, those that carry loss, and the seconds to prepare and to batch."""
    found = {"name": name, "tokens": tokens, "trained": trained, "prepare": seconds[0], "batch": seconds[1]}
    print(json.dumps({**found, "seconds": sum(seconds), "peak_rss": peak_rss}))
