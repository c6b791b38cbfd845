"""TRL's SFTTrainer on the benchmark's data, with its own defaults: prepare the data set, and collate it once."""

import os
import tempfile
import time
from pathlib import Path

import job


def main() -> None:
    asked = job.arguments()
    with tempfile.TemporaryDirectory() as folder:
        # Nothing prepared by an earlier turn may be found again.
        os.environ["HF_DATASETS_CACHE"] = folder
        measure(asked.model, asked.rows, folder)


def measure(model: Path, rows: Path, folder: str) -> None:
    """Prepare the rows as the trainer does on its own, then go through its batches once."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=job.DATA_BATCH_SIZE,
        max_length=512,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_steps=1,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    few = load_dataset("json", data_files=str(rows), split="train[:8]")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = SFTTrainer(model=network, args=config, train_dataset=few, processing_class=tokenizer)
    started = time.perf_counter()
    data = load_dataset("json", data_files=str(rows), split="train")
    trainer.train_dataset = trainer._prepare_dataset(data, tokenizer, config, False, None, "train")  # noqa: FBT003
    prepared = time.perf_counter()
    tokens = trained = 0
    for batch in trainer.get_train_dataloader():
        tokens += int(batch["attention_mask"].sum())
        trained += int((batch["labels"][:, 1:] != -100).sum())
    ended = time.perf_counter()
    job.tell_data("trl", tokens, trained, (prepared - started, ended - prepared), job.peak_rss())


if __name__ == "__main__":
    main()
