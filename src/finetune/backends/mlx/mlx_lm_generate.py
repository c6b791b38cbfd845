"""A program that answers questions with mlx-lm alone: its loader, its chat template, its greedy generation."""

import json
import sys

from finetune.backends.mlx.blas import load_fast_blas


def main() -> None:
    """Answer one request from standard input, in one line of JSON on standard output."""
    load_fast_blas()
    from mlx_lm import generate, load

    request = json.load(sys.stdin)
    model, tokenizer = load(request["model"])
    answers = []
    for question in request["questions"]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        answers.append(generate(model, tokenizer, prompt, max_tokens=request["most"]))
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
