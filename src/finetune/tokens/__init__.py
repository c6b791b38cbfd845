"""Turns rendered rows into token ids, trained marks and batches. Verb: encode.

`FileTokenizer` -> `encode_rows` -> `epoch_batches`.
"""
