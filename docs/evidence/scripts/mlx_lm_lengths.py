"""mlx-lm: are rows batched with rows of like length, as its batches are meant to be?"""

from mlx_lm.tuner.datasets import CacheDataset


class Rows:
    """Two rows, of one and of nine letters, read as mlx-lm's data sets are."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> dict[str, str]:
        return {"prompt": "a", "completion": "b" * (1, 9)[place]}

    def process(self, row: dict[str, str]) -> tuple[list[int], int]:
        return list(map(ord, row["prompt"] + row["completion"])), 0


rows = CacheDataset(Rows())
print("expected: lengths 2, 10, by which rows are sorted")
print(f"got: lengths {rows.itemlen(0)}, {rows.itemlen(1)}")
