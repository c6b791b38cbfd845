"""TRL's SFTTrainer on the benchmark's job, with its own defaults for everything the job leaves open."""

import tempfile
import time

import job
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Starts when the first step does and stops when the last one has."""

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ended = time.perf_counter()


def main() -> None:
    asked = job.arguments()
    task = job.JOBS[asked.job]
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(asked.model)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=task.batch_size,
            max_steps=asked.steps,
            learning_rate=job.LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=1024,
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
            seed=0,
        )
        clock = Clock()
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": task.rows()}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=job.RANK, lora_alpha=job.ALPHA, target_modules=list(task.modules)),
            callbacks=[clock],
        )
        trainer.train()
    tokens = int(trainer.state.num_input_tokens_seen)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    job.tell(asked.name, tokens, clock.ended - clock.started, job.peak_rss(), losses)


if __name__ == "__main__":
    main()
