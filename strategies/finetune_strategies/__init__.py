"""Hypothesis strategies for FineTune's values. Import the module you need; `st.from_type` knows the types without it.

`configs`, `config_files`: settings and the files they stand in. `models`, `adapters`: tiny models, LoRA that fits them
or just does not. `conversations`, `datasets`: rows as words and as ids. `data_files`, `damaged_files`: files to read or
to refuse. `tokenizers`: tokenizer folders. `faults`: what happens to files. `recipes`, `cases`: what the laws of
`finetune.verify` are judged on. `profiles`: how hard to look.
"""
