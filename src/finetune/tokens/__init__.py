"""Turns rendered rows into token ids, trained marks and batches. Verb: encode.

`FileTokenizer` -> `encode_rows` (`mark_rows`, then `fit_rows`) -> `epoch_batches`.
"""
