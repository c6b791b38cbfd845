"""Writes models and adapters as GGUF, llama.cpp's format, and proves that llama.cpp computes the same. Verb: convert.

`plan_model` or `plan_adapter` -> `write_gguf` -> `read_back` -> `compare`.
"""
