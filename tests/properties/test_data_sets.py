"""Laws of data sets: which files a name means, which part is trained on, what is refused, and how sources are mixed."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.parts import find_set
from finetune.data.read import read_rows
from finetune.data.sources import SourcedRows, files_of, mixed_counts
from finetune.errors import DataError
from finetune_strategies.profiles import examples

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(9)]


def lines(*numbers: int) -> bytes:
    """These rows, one a line."""
    return "".join(json.dumps(ROWS[number]) + "\n" for number in numbers).encode()


def made(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


SETS: dict[str, tuple[dict[str, int], str, set[str]]] = {
    "mlx-lm": ({"train.jsonl": 3, "valid.jsonl": 2, "test.jsonl": 1}, "valid", {"test"}),
    "validation": ({"train.jsonl": 3, "validation.jsonl": 2}, "valid", set()),
    "other words": ({"my-train_v2.ndjson": 3, "my-dev_v2.ndjson": 2, "my-testing.ndjson": 1}, "valid", {"test"}),
    "folders": ({"train/a.jsonl": 2, "train/b.jsonl": 1, "val/a.jsonl": 2}, "valid", set()),
    "hub": ({"data/train-00000-of-00002.jsonl": 1, "data/train-00001-of-00002.jsonl": 2}, "", set()),
    "splits": ({"data/train_sft-00000-of-00001.jsonl": 3, "data/test_sft-00000-of-00001.jsonl": 1}, "", {"test_sft"}),
    "no parts": ({"a.jsonl": 1, "b.jsonl": 2, "README.md": 0, "dataset_infos.json": 0}, "", set()),
    "packed": ({"train.jsonl.gz": 3, "eval.jsonl.gz": 2}, "valid", set()),
    "hidden": ({"train.jsonl": 3, ".ipynb_checkpoints/train.jsonl": 4}, "", set()),
    "one set inside": ({"en/train.jsonl": 3, "en/valid.jsonl": 2}, "valid", set()),
}
"""Folders: how many rows their files have; which part is held out, and which is neither."""


@pytest.mark.parametrize("kind", SETS)
def test_folder_is_trained_on_by_its_parts(kind: str, tmp_path: Path) -> None:
    """The part `train`, or all files where none is named, is trained on, in order; `valid` is held out; no test is."""
    files, valid, others = SETS[kind]
    contents = {name: lines(*range(count)) for name, count in files.items()}
    folder = made(
        tmp_path, {name: gzip.compress(each) if name.endswith("gz") else each for name, each in contents.items()}
    )
    found = find_set(str(folder))
    assert sum(len(read_rows(path)) for path in found.files) == 3
    assert list(found.files) == sorted(found.files)
    assert (found.valid or "") == valid
    assert set(found.others) - {valid} == others
    for part in found.others:
        assert find_set(f"{folder}:{part}").files == found.others[part]


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no data": (lambda at: made(at, {"README.md": b"x", "a.png": b"x"}), ("holds no data files",)),
    "only a test part": (lambda at: made(at, {"test.jsonl": lines(1)}), ("no part train", ":test")),
    "several sets": (lambda at: made(at, {"en/a.jsonl": b"", "fr/a.jsonl": b""}), ("several sets: en, fr", "/en")),
    "unnamed beside parts": (lambda at: made(at, {"train.jsonl": b"", "extra.jsonl": b""}), ("extra.jsonl",)),
    "two kinds": (lambda at: made(at, {"a.jsonl": b"", "b.csv": b""}), (".csv, .jsonl", "*.csv")),
    "packed and not": (lambda at: made(at, {"train.jsonl": b"", "train.jsonl.gz": b""}), (".jsonl.gz",)),
    "two parts in one name": (lambda at: made(at, {"train_test.jsonl": b""}), ("says both test and train",)),
    "two train parts": (
        lambda at: made(at, {f"data/{split}-00000-of-00001.jsonl": b"" for split in ("train_sft", "train_gen")}),
        ("several parts of train", ":train_gen"),
    ),
    "a shard is missing": (
        lambda at: made(at, {"train-00000-of-00003.jsonl": b"", "train-00002-of-00003.jsonl": b""}),
        ("1 are missing", "00001"),
    ),
    "a saved set that names others": (
        lambda at: made(at, {"state.json": b'{"_data_files": [{"filename": "../../etc/passwd"}]}'}),
        ("state.json names no files",),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_folder_that_is_unclear_is_refused_with_a_way_out(kind: str, tmp_path: Path) -> None:
    """A folder whose rows are unclear is one DataError that names it, what is there, and a remedy; nothing is read."""
    make, named = REFUSED[kind]
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        files_of(str(tmp_path))
    assert str(tmp_path) in caught.value.message
    assert all(word in str(caught.value) for word in named), str(caught.value)
    assert caught.value.hint


def test_pattern_is_a_set_whose_names_tell_parts(tmp_path: Path) -> None:
    """A pattern means the files that fit, by their parts; those of one part alone are what was asked for."""
    made(tmp_path, {f"{part}-{at}.jsonl": lines(at) for part in ("train", "valid") for at in range(2)})
    whole = find_set(f"{tmp_path}/*.jsonl")
    assert [path.name for path in whole.files] == ["train-0.jsonl", "train-1.jsonl"]
    assert whole.valid == "valid"
    only = find_set(f"{tmp_path}/valid*.jsonl")
    assert ([path.name for path in only.files], only.valid) == (["valid-0.jsonl", "valid-1.jsonl"], None)
    for nothing in ("*.csv", "nothing/*", "**/*.parquet"):
        with pytest.raises(DataError, match="no data file fits") as caught:
            find_set(f"{tmp_path}/{nothing}")
        assert nothing in str(caught.value)


def test_name_with_a_colon_or_a_star_is_its_file_first(tmp_path: Path) -> None:
    """What lies there under the whole name goes before parts and patterns."""
    for name in ("a:b.jsonl", "a*.jsonl", "owner"):
        (tmp_path / name).write_bytes(lines(1))
        assert find_set(str(tmp_path / name)).files == (tmp_path / name,)
    with pytest.raises(DataError, match="is a file and has no parts"):
        find_set(f"{tmp_path}/owner:train")


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    """Folders that are links are not followed; a link to itself is refused by name, in no time."""
    made(tmp_path / "set", {"train.jsonl": lines(1)})
    for name in ("one", "two"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "set")
    assert [path.name for path in find_set(str(tmp_path / "set")).files] == ["train.jsonl"]
    assert len(find_set(f"{tmp_path}/set/**/*.jsonl").files) == 1
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match=r"loop\.jsonl cannot be read"):
        list(SourcedRows(str(tmp_path / "loop.jsonl")))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    """A FIFO, alone or in a folder, and a device are refused at once."""
    os.mkfifo(tmp_path / "train.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in (tmp_path / "train.jsonl", tmp_path / "zero.jsonl"):
        with pytest.raises(DataError, match="a pipe, a device or a socket") as caught:
            list(SourcedRows(str(name)))
        assert caught.value.hint
    (tmp_path / "zero.jsonl").unlink()
    with pytest.raises(DataError, match="a pipe, a device or a socket"):
        list(SourcedRows(str(tmp_path)))


def test_several_sources_are_all_read_and_counted(tmp_path: Path) -> None:
    """Every source named is read, in its order and kind, and counted; a limit takes the first; none comes twice."""
    made(
        tmp_path, {"a.jsonl": lines(0, 1), "b.csv": b"prompt,completion\nquestion 2,answer 2\n", "c/x.jsonl": lines(3)}
    )
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c")]
    rows = SourcedRows(names)
    assert [row.values for row in rows] == ROWS[:4]
    assert [(source.name, source.rows, source.left_out) for source in rows.sources] == [
        (name, count, 0) for name, count in zip(names, (2, 1, 1), strict=True)
    ]
    assert [row.values for row in SourcedRows(names, limit=3)] == ROWS[:3]
    with pytest.raises(DataError, match="is named twice") as caught:
        SourcedRows([*names, f"{tmp_path}/*.jsonl"])
    assert "a.jsonl" in str(caught.value)


@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0, 3.0, 10.0])), min_size=1, max_size=5
    ),
    st.none() | st.integers(1, 200),
)
@examples(2)
def test_mixture_keeps_its_weights(sources: list[tuple[int, float]], limit: int | None) -> None:
    """Each source gives its share of the whole within one row, none more than it has, and one row more is too many."""
    sizes, weights = zip(*sources, strict=True)
    counts = mixed_counts(sizes, weights, limit)
    total, whole = sum(counts), sum(map(Fraction, map(str, weights)))
    shares = [Fraction(str(weight)) / whole for weight in weights]
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    assert total == limit or any(share * (total + 1) > size for share, size in zip(shares, sizes, strict=True))


def test_mixture_is_chosen_by_the_seed_alone(tmp_path: Path) -> None:
    """The same seed takes the same rows of each source, in order and none twice; another seed takes others."""
    made(tmp_path, {"a.jsonl": lines(*range(9)) * 5, "b.jsonl": lines(*range(5))})
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]

    def mixed(seed: int) -> list[str]:
        rows = SourcedRows(names, weights=[3, 1], seed=seed)
        places = [row.where for row in rows]
        assert [source.rows - source.left_out for source in rows.sources] == [15, 5]
        assert Counter(place.rpartition(":")[0] for place in places) == {names[0]: 15, names[1]: 5}
        assert len(set(places)) == 20
        return places

    assert mixed(0) == mixed(0) != mixed(1)
    with pytest.raises(DataError, match=r"data\.mix has 1 weight") as caught:
        SourcedRows(names, weights=[3])
    assert caught.value.hint
    with pytest.raises(DataError, match=r"leaves no row of .*b\.jsonl"):
        list(SourcedRows(names, weights=[1000, 1]))


README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: "socratic/train*"
---
# a set
"""


def hub_cache(folder: Path) -> Path:
    """The hub's cache as huggingface_hub lays it out, with one set of two subsets in it."""
    place = folder / "hub" / "datasets--owner--sums"
    made(place, {"refs/main": b"0123456789abcdef0123456789abcdef01234567"})
    files = {
        "README.md": README.encode(),
        "main/train-00000-of-00001.jsonl": lines(0, 1, 2),
        "main/test-00000-of-00001.jsonl": lines(3),
        "socratic/train.jsonl": lines(4, 5),
    }
    made(place / "snapshots" / "0123456789abcdef0123456789abcdef01234567", files)
    return folder


HUB = {
    "owner/sums:main": [0, 1, 2],
    "owner/sums:main:test": [3],
    "owner/sums@main:socratic": [4, 5],
    "owner/sums": ["several subsets: main, socratic", "owner/sums:main"],
    "owner/sums:main:dev": ["no part dev, but train, test"],
    "owner/other": ["owner/other", "no file or folder of that name here, and HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE"],
    "owner/sums@nope:main": ["owner/sums", "HF_HUB_OFFLINE is set"],
}


def test_set_of_the_hub_is_found_in_its_cache(tmp_path: Path) -> None:
    """Without the hub its own cache is read: subset, part and revision; what is not there is one clear error."""
    program = (
        "import json, sys\nfrom finetune.data.sources import SourcedRows\nfrom finetune.errors import DataError\n"
        "def of(name):\n    try: return [int(row.values['prompt'].split()[1]) for row in SourcedRows(name)]\n"
        "    except DataError as error: return str(error)\n"
        "print(json.dumps([of(name) for name in sys.argv[1:]]))"
    )
    environment = {**os.environ, "HF_HOME": str(hub_cache(tmp_path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *HUB], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    for (name, expected), found in zip(HUB.items(), json.loads(done.stdout), strict=True):
        if isinstance(found, list):
            assert found == expected, name
        else:
            assert all(str(word) in found for word in expected), (name, found)
            assert len(found.splitlines()) <= 3
            assert len(found) <= 240


def test_saved_set_is_read_part_by_part(tmp_path: Path) -> None:
    """What `datasets` saves, alone or by parts, is read from its Arrow files, in order."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'finetune-suite[parquet]'")

    def saved(folder: Path, rows: list[dict[str, str]]) -> None:
        folder.mkdir(parents=True)
        halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        names = [f"data-{at:05d}-of-00002.arrow" for at in range(2)]
        for name, half in zip(names, halves, strict=True):
            table = pyarrow.Table.from_pylist(half, schema=pyarrow.Table.from_pylist(ROWS).schema)
            with pyarrow.ipc.new_stream(str(folder / name), table.schema) as file:
                file.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text("{}")

    saved(tmp_path / "alone", ROWS[:5])
    assert [row.values for row in SourcedRows(str(tmp_path / "alone"))] == ROWS[:5]
    saved(tmp_path / "parts" / "train", ROWS[:6])
    saved(tmp_path / "parts" / "validation", ROWS[6:])
    (tmp_path / "parts" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert [row.values for row in SourcedRows(str(tmp_path / "parts"))] == ROWS[:6]
    assert find_set(str(tmp_path / "parts")).valid == "validation"
    assert [row.values for row in SourcedRows(f"{tmp_path}/parts:validation")] == ROWS[6:]
