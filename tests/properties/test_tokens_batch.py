"""Laws of batches: every row once an epoch, in an order that only the seed decides, and apart where rows share."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import epoch_batches, fixed_batches, pack_rows, shared_start
from finetune.records import Batch, TokenizedRow


def token_rows() -> st.SearchStrategy[list[TokenizedRow]]:
    """Rows of ids, many of one length, some equal."""
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=7).map(tuple)
    return st.lists(ids.map(lambda found: TokenizedRow(found, (True,) * len(found), "a:1")), max_size=70)


def ordered(batches: list[Batch]) -> list[tuple[int, ...]]:
    """The rows' ids in the order of the batches."""
    return [row.ids for batch in batches for row in batch.rows]


@given(token_rows(), st.integers(1, 9))
def test_fixed_batches_hold_every_row_once_by_length(rows: list[TokenizedRow], size: int) -> None:
    """Batches to measure a loss on hold all rows and nothing else, the shortest first, full but for a remainder."""
    batches = fixed_batches(rows, size)
    assert Counter(row for batch in batches for row in batch.rows) == Counter(rows)
    assert [len(batch.rows) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    lengths = [len(row) for row in ordered(batches)]
    assert lengths == sorted(lengths)


def test_batches_are_of_similar_length() -> None:
    """Within an epoch little is padded: most batches hold rows of nearly one length."""
    rows = [TokenizedRow((number,) * (1 + number % 50), (True,) * (1 + number % 50), "a:1") for number in range(200)]
    batches = epoch_batches(rows, 4, seed=0, epoch=1)
    padded = sum(max(len(row.ids) for row in batch.rows) * len(batch.rows) for batch in batches)
    assert padded < 1.15 * sum(len(row.ids) for row in rows)


def sizes(found: list[tuple[TokenizedRow, ...]]) -> list[int]:
    """How many tokens each sequence holds."""
    return [sum(len(row.ids) for row in sequence) for sequence in found]


def test_packing_seed_decides_among_equals() -> None:
    """Rows of one length are dealt out by the seed, 0 among them."""
    rows = [TokenizedRow((number,) * 3, (True,) * 3, f"a:{number}") for number in range(40)]
    packed = [pack_rows(rows, 10, seed=seed) for seed in (0, 0, 1, 2)]
    assert packed[0] == packed[1]
    assert len({tuple(found) for found in packed}) == 3
    assert sizes(packed[0]) == [9] * 13 + [3]


def test_packing_fills_what_can_be_filled() -> None:
    """Of rows of all lengths hardly a token's place stays empty."""
    rows = [TokenizedRow((number,) * (1 + number % 50), (True,) * (1 + number % 50), "a:1") for number in range(500)]
    found = pack_rows(rows, 64, seed=0)
    assert sum(sizes(found)) / (64 * len(found)) > 0.98
    assert all(first + second > 64 for at, first in enumerate(sizes(found)) for second in sizes(found)[:at])


def test_batches_packed_order_follows_seed_and_epoch() -> None:
    """Every epoch and seed has its own order; who shares a sequence is the seed's alone."""
    rows = [TokenizedRow((number,) * (1 + number % 5), (True,) * (1 + number % 5), "a:1") for number in range(97)]
    found = {(s, e): epoch_batches(rows, 3, seed=s, epoch=e, pack_length=9) for s in (0, 1) for e in (0, 1, 2)}
    assert len({tuple(ordered(batches)) for batches in found.values()}) == 6
    shared = {
        key: frozenset(sequence for batch in batches for sequence in batch.sequences) for key, batches in found.items()
    }
    assert shared[0, 0] == shared[0, 1] == shared[0, 2] != shared[1, 0] == shared[1, 1]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_batch_sequences_are_its_rows_in_order(counts: list[int]) -> None:
    """What a batch says of who shares a sequence partitions its rows, and without a word each row is alone."""
    rows = tuple(TokenizedRow((number,), (True,), "a:1") for number in range(sum(counts)))
    packed = Batch(rows, tuple(counts)).sequences
    assert [len(sequence) for sequence in packed] == counts
    assert tuple(row for sequence in packed for row in sequence) == rows
    assert Batch(rows).sequences == tuple((row,) for row in rows)


@given(token_rows(), st.lists(st.integers(0, 9), max_size=9), st.integers(0, 9))
def test_what_a_batch_shares_is_in_every_row_and_decides_no_target(
    rows: list[TokenizedRow], prompt: list[int], untrained: int
) -> None:
    """So many first tokens are equal in all rows, none of them stands next to a target, and half of all is saved."""
    begun = [
        TokenizedRow((*prompt, *row.ids), (*(at >= untrained for at in range(len(prompt))), *row.trained), row.where)
        for row in rows
    ]
    batch = Batch(tuple(begun))
    shared = shared_start(batch)
    assert len({row.ids[:shared] for row in begun}) <= 1
    assert not any(any(row.trained[1 : shared + 1]) for row in begun)
    # All of the prompt, where it is long and nothing of it is learned: whoever answers has read its last token.
    if len(begun) > 1 and untrained > 8 and 2 * (len(prompt) - 1) * (len(begun) - 1) >= batch.token_count:
        assert shared == len(prompt) - 1
    assert shared_start(Batch(batch.rows, (len(begun),))) == 0
