"""transformers: is a loss that is no number told as one?"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
with torch.no_grad():
    model.lm_head.weight.fill_(float("nan"))
rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder, max_steps=2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
logged = [each for each in trainer.state.log_history if "loss" in each]
print("expected: every logged loss is nan, or the run stops")
print("got:", "; ".join(f"loss {each['loss']}, grad_norm {each['grad_norm']}" for each in logged))
