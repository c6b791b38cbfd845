"""The jobs of the benchmark, the same for every trainer.

Training: `JOBS`. Data: questions and answers in the shipped Llama's own chat format, from a file to padded batches
with labels.
"""

import argparse
import json
import random
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK, ALPHA = 8, 16
DATA_BATCH_SIZE = 8
LEARNING_RATE = 1e-4
LLAMA = {
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
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "bos_token_id": 1, "eos_token_id": 2}
LLAMA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained: a random model of that configuration, or a shipped one by its name, on rows of drawn lengths."""

    title: str
    model: dict[str, Any] | str
    modules: tuple[str, ...]
    batch_size: int
    shortest: int
    longest: int
    steps: int

    def rows(self) -> list[list[int]]:
        """Token ids of every row: the same for every trainer."""
        rng = random.Random(0)
        words = range(3, 512) if isinstance(self.model, str) else range(3, 1024)
        return [[rng.choice(words) for _ in range(rng.randint(self.shortest, self.longest))] for _ in range(512)]


JOBS = {
    "long": Job("9.8 M Llama, 8 rows of 8 to 560 tokens", LLAMA, LLAMA_MODULES, 8, 8, 560, 20),
    "gpt2": Job("GPT-2 124 M, 4 rows of 8 to 128 tokens", GPT2, ("c_attn", "c_proj", "c_fc"), 4, 8, 128, 6),
    "short": Job("shipped Llama, 8 rows of 4 to 24 tokens", "reference-llama", LLAMA_MODULES, 8, 4, 24, 100),
}


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
    parser.add_argument("--name", default="", help="what the measurement goes by")
    parser.add_argument("--job", choices=list(JOBS), help="what is trained")
    parser.add_argument("--steps", type=int, help="how many steps are trained")
    parser.add_argument("--backend", default="torch", help="what FineTune trains with")
    parser.add_argument("--rows", type=Path, help="the file of questions to prepare")
    return parser.parse_args()


def peak_rss() -> int:
    """The highest resident set of this process so far, in bytes; `getrusage` would begin with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return (
            int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tell(name: str, tokens: int, seconds: float, peak_rss: int, losses: list[float], **more: float) -> None:
    """Print what one trainer measured, as one JSON object on the last line."""
    found = {"name": name, "tokens": tokens, "seconds": seconds, "peak_rss": peak_rss, "losses": losses}
    print(json.dumps({**found, **more}))


def tell_data(name: str, tokens: int, trained: int, seconds: tuple[float, float], peak_rss: int) -> None:
    """Print what one preparation measured: tokens, those that carry loss, and the seconds to prepare and to batch."""
    found = {"name": name, "tokens": tokens, "trained": trained, "prepare": seconds[0], "batch": seconds[1]}
    print(json.dumps({**found, "seconds": sum(seconds), "peak_rss": peak_rss}))
