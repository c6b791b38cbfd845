"""FineTune on the benchmark's data: read, render, encode, mask, and put into padded tensors."""

import time

import job

from finetune.backends import open_backend
from finetune.chat.encoder import Encoder
from finetune.config import ModelAndDataFacts, load_config, resolve
from finetune.data.batches import epoch_batches
from finetune.data.read import read_rows
from finetune.data.shape import shape_rows
from finetune.records import ModelLocation


def main() -> None:
    asked = job.arguments()
    location = ModelLocation("bench", asked.model, "local")
    session = open_backend("torch").open(location, "float32", pad_id=0)
    loaded = load_config(None, environ={}, overrides={"tokens.max_length": 512}, profile=None)
    plan = resolve(loaded, ModelAndDataFacts(512, has_chat_template=True, train_rows=1))
    started = time.perf_counter()
    encoded = Encoder(location, "tokenizer").encode(shape_rows(read_rows(asked.rows)), plan)
    prepared = time.perf_counter()
    for batch in epoch_batches(encoded.rows, job.DATA_BATCH_SIZE, seed=0, epoch=0):
        session._tensors(batch)
    ended = time.perf_counter()
    counts = encoded.counts
    job.tell_data(
        "finetune", counts.tokens, counts.trained_tokens, (prepared - started, ended - prepared), job.peak_rss()
    )


if __name__ == "__main__":
    main()
