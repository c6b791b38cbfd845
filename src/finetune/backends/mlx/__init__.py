"""Trains with MLX and mlx-lm: on Apple's GPU where there is one, else on any processor.

Files: backend (create, open), blas (speed without a GPU), zoo (mlx-lm's models, loaded strictly), names (of weights,
ours and those of transformers), packed (quantised weights), layers (LoRA), fold (its product), trip (batches to
losses and answers), optimizer (AdamW and clipping), adapter (its files, PEFT's and mlx-lm's), tensors (safetensors),
session (verbs), state (save, load), probe, reload.
"""

from finetune.backends.mlx.blas import load_fast_blas

load_fast_blas()
