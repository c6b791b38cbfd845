"""mlx-lm: is every row trained on?"""

from mlx_lm.tuner.trainer import iterate_batches


rows = [([number] * 4, 0) for number in range(1, 6)]
batches = iterate_batches(rows, batch_size=2, max_seq_length=32, loop=True)
seen = {int(token) for _ in range(500) for token in next(batches)[0][:, 0]}
print("expected: rows 1, 2, 3, 4, 5 in 500 batches of 2")
print(f"got: rows {', '.join(map(str, sorted(seen)))}")
