"""Runs llama.cpp's own converter, once for each line of JSON on standard input; prints how long each took, in seconds,
and the most memory that the process held.

Its guess of the pre-tokenizer from a hash of encoded text, which refuses every tokenizer that it has not seen, is
replaced by the name in the request; with no name, the tokenizer is left out.
"""

import json
import runpy
import sys
import time
from pathlib import Path

from job import peak_rss
from peers import converter


def convert(request: dict[str, str]) -> float:
    """Convert one model; the seconds that it took."""
    from conversion import ModelBase, ModelType, base, get_model_architecture, get_model_class

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: request["pre"]
    hparams = ModelBase.load_hparams(Path(request["model"]), is_mistral_format=False)
    kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    kept = kind.set_vocab
    if not request["pre"]:
        kind.set_vocab = lambda self: None
    started = time.perf_counter()
    sys.argv = [
        "convert_hf_to_gguf.py",
        request["model"],
        "--outtype",
        request["outtype"],
        "--outfile",
        request["file"],
    ]
    runpy.run_path(str(converter() / "convert_hf_to_gguf.py"), run_name="__main__")
    kind.set_vocab = kept
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.path[:0] = [str(converter()), str(converter() / "gguf-py")]
    print(json.dumps({"seconds": [convert(json.loads(line)) for line in sys.stdin], "peak_rss": peak_rss()}))
