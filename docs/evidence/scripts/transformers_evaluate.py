"""transformers: does the loss of an evaluation depend on how rows are batched?"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=1.0))
rows = []
for learned in (1, 30, 3, 25):  # so many tokens of a row are learned
    ids = torch.randint(0, 64, (32,)).tolist()
    rows.append({"input_ids": ids, "labels": [-100] * (32 - learned) + ids[32 - learned :]})


def loss(rows: list[dict[str, list[int]]], size: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_eval_batch_size=size, report_to=[], disable_tqdm=True, use_cpu=True)
        return Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]


print("expected: one loss, whatever the size of a batch")
print(f"got: {loss(rows, 1):.2f} one row at a time, {loss(rows, 2):.2f} two, {loss(rows, 4):.2f} four")
