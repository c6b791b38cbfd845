"""Laws of the strategies: they reach every corner, what they say of a value is so, and failures become small."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.adapters.choose import check_rank, choose_layers
from finetune.backends import open_backend
from finetune.config import TrainingConfig, flatten
from finetune.errors import ModelError, UsageError
from finetune.models.shape import read_shape
from finetune.records import ModelShape, fits
from finetune_strategies.adapters import (
    AdaptedModel,
    UnfitAdapter,
    adapted_layers,
    adapted_models,
    adapter_targets,
    unfit_adapters,
    varied_models,
)
from finetune_strategies.configs import NULLABLE, SETTINGS, configs
from finetune_strategies.datasets import (
    LARGEST_SEED,
    ROW_SHAPES,
    DataSet,
    Dealing,
    batches,
    data_sets,
    dealings,
    seeds,
    token_rows,
)
from finetune_strategies.drawing import drawn, simplest
from finetune_strategies.faults import (
    DiskFull,
    Flipped,
    Killed,
    Missing,
    Torn,
    Truncated,
    damage,
    file_faults,
    full_disks,
    kills,
)
from finetune_strategies.models import Config, gpt2_configs, llama_configs, model_configs, shape_of_config
from finetune_strategies.profiles import examples
from finetune_strategies.registration import STRATEGIES, strategy_for
from finetune_strategies.scratch import empty_folder

pytestmark = pytest.mark.tools

SIZES = {"a.bin": 7, "b.bin": 1, "empty": 0}


def head_width(config: Config) -> int:
    """How wide one head of a Llama is."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def divides_all(model: AdaptedModel) -> bool:
    """Whether the rank divides both sides of every layer that is adapted."""
    sides = [side for layer in adapted_layers(model.shape, model.target) for side in layer.shape]
    return not any(side % model.target.rank for side in sides)


def patterns_overlap(model: AdaptedModel) -> bool:
    """Whether two patterns of ranks fit one layer."""
    layers = [layer.name for layer in adapted_layers(model.shape, model.target)]
    return any(sum(fits(key, path) for key in model.target.rank_pattern) > 1 for path in layers)


def settings_filled(config: TrainingConfig) -> int:
    """How many of the settings that may be null are not; one alone would be counted by luck (9 to 45 in 24 runs)."""
    values = flatten(config)
    return sum(values[key] is not None for key in NULLABLE)


Corners = dict[str, tuple[Callable[[Any], bool], int]]
CORNERS: dict[str, tuple[st.SearchStrategy[Any], Corners]] = {
    "seeds": (
        seeds(),
        {
            "0": (lambda seed: seed == 0, 1),
            "the largest": (lambda seed: seed == LARGEST_SEED, 1),
            "in between": (lambda seed: 1 < seed < LARGEST_SEED, 51),
            "above 31 bits": (lambda seed: seed > 2**31, 24),
        },
    ),
    "configs": (
        configs(),
        {
            "the default": (lambda config: config == TrainingConfig(), 2),
            "seed 0 given or not": (lambda config: config.training.seed == 0, 37),
            "seed above 31 bits": (lambda config: config.training.seed > 2**31, 2),
            "named targets": (lambda config: config.adapter.target_modules != "all-linear", 8),
            "five settings that may be null are not": (lambda config: settings_filled(config) >= 5, 25),
        },
    ),
    "llama_configs": (
        llama_configs(),
        {
            "key heads shared": (lambda c: c["num_key_value_heads"] < c["num_attention_heads"], 39),
            "more than one key head, shared": (lambda c: 1 < c["num_key_value_heads"] < c["num_attention_heads"], 16),
            "each head its own": (lambda c: c["num_key_value_heads"] == c["num_attention_heads"], 14),
            "no power of two heads": (lambda c: c["num_attention_heads"] & (c["num_attention_heads"] - 1) > 0, 120),
            "heads do not fill the width": (lambda c: head_width(c) * c["num_attention_heads"] != c["hidden_size"], 49),
            "heads fill the width": (lambda c: head_width(c) * c["num_attention_heads"] == c["hidden_size"], 4),
            "vocabulary no multiple of 64": (lambda c: c["vocab_size"] % 64 > 0, 120),
            "tied": (lambda c: c["tie_word_embeddings"], 30),
            "untied": (lambda c: not c["tie_word_embeddings"], 23),
            "another epsilon": (lambda c: c["rms_norm_eps"] == 0.02, 18),
            "theta as newer configs have it": (lambda c: "rope_parameters" in c, 31),
            "one layer": (lambda c: c["num_hidden_layers"] == 1, 39),
            "two layers": (lambda c: c["num_hidden_layers"] == 2, 14),
        },
    ),
    "gpt2_configs": (
        gpt2_configs(),
        {
            "inner size of its own": (lambda c: c["n_inner"] is not None, 25),
            "inner size as usual": (lambda c: c["n_inner"] is None, 27),
            "dropout": (lambda c: c["resid_pdrop"] > 0, 28),
            "untied": (lambda c: not c["tie_word_embeddings"], 16),
            "no power of two heads": (lambda c: c["n_head"] & (c["n_head"] - 1) > 0, 120),
            "width is no multiple of 8": (lambda c: c["n_embd"] % 8 > 0, 120),
        },
    ),
    "adapted_models": (
        adapted_models(),
        {
            "llama": (lambda m: m.config["model_type"] == "llama", 25),
            "gpt2": (lambda m: m.config["model_type"] == "gpt2", 28),
            "rank 1": (lambda m: m.target.rank == 1, 3),
            "rank that does not divide": (lambda m: not divides_all(m), 49),
            "scale is not 1": (lambda m: m.target.alpha != m.target.rank, 120),
            "scale below 1": (lambda m: m.target.alpha < m.target.rank, 16),
            "dropout": (lambda m: m.target.dropout > 0, 27),
            "no dropout": (lambda m: m.target.dropout == 0, 25),
            "all layers": (lambda m: len(adapted_layers(m.shape, m.target)) == len(m.shape.linear_layers), 16),
            "some layers": (lambda m: len(adapted_layers(m.shape, m.target)) < len(m.shape.linear_layers), 37),
        },
    ),
    "varied_models": (
        varied_models(),
        {
            "dora": (lambda m: m.target.kind == "dora", 2),
            "lora": (lambda m: m.target.kind == "lora", 2),
            "ia3": (lambda m: m.target.kind == "ia3", 2),
            "rank-stabilised": (lambda m: m.target.scaling == "rank_stabilized", 2),
            "ranks by pattern": (lambda m: len(m.target.rank_pattern) > 0, 2),
            "alphas by pattern": (lambda m: len(m.target.alpha_pattern) > 0, 2),
            "two patterns fit one layer": (patterns_overlap, 2),
            "trained whole": (lambda m: len(m.target.saved) > 0, 2),
            "an untied table trained whole": (lambda m: "lm_head" in m.target.saved, 2),
            "a layer trained whole": (lambda m: any(path.endswith("_proj") for path in m.target.saved), 2),
            "nothing trained whole": (lambda m: not m.target.saved, 2),
        },
    ),
    "unfit_adapters": (
        unfit_adapters(),
        {
            "rank too large": (lambda unfit: unfit.reason == "rank too large", 12),
            "matches nothing": (lambda unfit: unfit.reason == "matches nothing", 41),
        },
    ),
    "dealings": (
        dealings(),
        {
            "short last batch": (lambda dealing: dealing.left_over > 0, 41),
            "even": (lambda dealing: dealing.left_over == 0, 12),
            "one row a batch": (lambda dealing: dealing.batch_size == 1, 5),
            "batch larger than all rows": (lambda dealing: dealing.batch_size > dealing.rows, 9),
            "accumulated": (lambda dealing: dealing.accumulation > 1, 29),
        },
    ),
    "data_sets": (
        data_sets(),
        {
            "twelve rows": (lambda data: data.size == 12, 4),
            "one row": (lambda data: data.size == 1, 14),
            "short last batch": (lambda data: data.size % data.batch_size > 0, 29),
            "seed 0": (lambda data: data.seed == 0, 7),
            **{shape: (lambda data, shape=shape: data.row_shape == shape, 10) for shape in ROW_SHAPES},
        },
    ),
    "batches": (
        batches(),
        {
            "last batch short": (lambda found: len(found[-1].rows) < len(found[0].rows), 19),
            "a single batch": (lambda found: len(found) == 1, 22),
            "unequal lengths": (lambda found: len({len(row.ids) for each in found for row in each.rows}) > 1, 37),
            "trained and not": (
                lambda found: any(len(set(row.trained)) == 2 for each in found for row in each.rows),
                75,
            ),
        },
    ),
    "kills": (
        kills(),
        {
            "before a write": (lambda kill: kill.moment == "before", 16),
            "after a write": (lambda kill: kill.moment == "after", 16),
            "at the first step": (lambda kill: kill.step == 1, 2),
            "at a later write": (lambda kill: kill.write > 1, 25),
        },
    ),
    "file_faults": (
        file_faults(SIZES),
        {
            **{
                kind.__name__: (lambda fault, kind=kind: isinstance(fault, kind), 4)
                for kind in (Torn, Truncated, Flipped)
            },
            "missing": (lambda fault: isinstance(fault, Missing), 1),
            "the empty file": (lambda fault: fault.file == "empty", 1),
            "first byte": (lambda fault: isinstance(fault, Flipped) and fault.offset == 0, 32),
            "last byte": (lambda fault: fault in [Flipped("a.bin", 6, mask) for mask in range(256)], 6),
            "nothing left": (lambda fault: isinstance(fault, Truncated) and fault.size == 0, 1),
        },
    ),
    "full_disks": (
        full_disks(SIZES),
        {"no room": (lambda disk: disk.size == 0, 1), "one byte too few": (lambda disk: disk.size == 6, 1)},
    ),
}


@pytest.mark.parametrize("name", CORNERS)
def test_strategy_reaches_every_corner(name: str) -> None:
    """Of 120 values, the same at every run, at least the stated number lies in each corner."""
    strategy, corners = CORNERS[name]
    values = drawn(strategy)
    counts = {corner: sum(map(wanted, values)) for corner, (wanted, _) in corners.items()}
    assert {corner: count for corner, count in counts.items() if count < corners[corner][1]} == {}


@given(llama_configs())
@examples(1 / 2)
def test_model_shape_is_what_the_files_hold(config: Config) -> None:
    """The shape counted by hand from a config is what a model made from it has in its files."""
    with empty_folder() as folder:
        open_backend("reference").create(config, folder, 0)
        assert read_shape(folder) == shape_of_config(config)


@given(adapted_models())
def test_adapter_fits_its_model(model: AdaptedModel) -> None:
    """An adapter drawn for a model is accepted for it, by the names of layers and by its rank."""
    assert choose_layers(model.shape, model.target.modules) == model.target.modules
    check_rank(model.shape, model.target)
    assert adapted_layers(model.shape, model.target)


@given(model_configs().map(shape_of_config).flatmap(lambda s: st.tuples(st.just(s), adapter_targets(s, paths=True))))
def test_adapter_by_path_sits_somewhere(drawn_pair: tuple[ModelShape, Any]) -> None:
    """Each name, short or a path, hits a layer, and the rank fits every layer that is hit."""
    shape, target = drawn_pair
    for name in target.modules:
        assert adapted_layers(shape, type(target)(1, 1.0, 0.0, (name,)))
    assert target.rank <= min(min(layer.shape) for layer in adapted_layers(shape, target))


@given(unfit_adapters())
def test_adapter_unfit_is_refused_for_its_reason(unfit: UnfitAdapter) -> None:
    """A near miss is refused by exactly the check that its reason names, in words that say how to mend it."""
    by_rank = unfit.reason == "rank too large"
    if by_rank:
        assert choose_layers(unfit.shape, unfit.target.modules) == unfit.target.modules
    with pytest.raises(ModelError) as caught:
        check_rank(unfit.shape, unfit.target) if by_rank else choose_layers(unfit.shape, unfit.target.modules)
    assert [word for word in unfit.named if word not in str(caught.value)] == []


def test_fault_does_what_it_says(tmp_path: Path) -> None:
    """Each of these kinds leaves exactly the bytes that its words say, and says whether anything changed."""
    content = b"abc\0\0"
    expected = {
        Truncated("f", 2): (b"ab", "f cut to 2 bytes"),
        Torn("f", 2): (b"ab\0\0\0", "f torn after 2 bytes"),
        Flipped("f", 1, 3): (b"aac\0\0", "f changed at byte 1 by 0x03"),
        Missing("f"): (None, "f gone"),
    }
    for fault, (left, words) in expected.items():
        (tmp_path / "f").write_bytes(content)
        assert damage(tmp_path, fault)
        assert ((tmp_path / "f").read_bytes() if (tmp_path / "f").exists() else None) == left
        assert fault.describe() == words
    (tmp_path / "f").write_bytes(content)
    assert not damage(tmp_path, Torn("f", 3))
    assert Killed(2, "before", 1).describe() == "killed at step 2, before its write number 1"
    assert DiskFull(9).describe() == "disk full after 9 bytes"
    for impossible in (Truncated("f", 5), Flipped("f", 5, 1), Missing("g")):
        with pytest.raises(UsageError, match=r"only 5|no such file") as caught:
            damage(tmp_path, impossible)
        assert caught.value.hint
    with pytest.raises(UsageError, match="empty"):
        full_disks({"empty": 0})


SIMPLEST: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bool], Any]] = {
    "seed": (seeds(), lambda seed: True, 0),
    "seed above one": (seeds(), lambda seed: 1 < seed < LARGEST_SEED, 2),
    "dealing": (dealings(), lambda dealing: True, Dealing(1, 2, 1)),
    "dealing of three batches": (dealings(), lambda d: d.rows > 2 * d.batch_size > 2, Dealing(5, 2, 1)),
    "kill": (kills(), lambda kill: True, Killed(1, "before", 1)),
    "late kill": (kills(), lambda kill: kill.moment == "after", Killed(1, "after", 1)),
    "flip": (file_faults(SIZES), lambda fault: isinstance(fault, Flipped), Flipped("a.bin", 0, 1)),
    "truncation": (file_faults(SIZES), lambda fault: isinstance(fault, Truncated), Truncated("a.bin", 0)),
    "data set": (data_sets(), lambda data: True, DataSet(12, 0, "alpaca", 5)),
}


@pytest.mark.parametrize("name", SIMPLEST)
def test_strategy_failures_become_the_simplest_value(name: str) -> None:
    """The value that a failure is reported with is the one stated here."""
    strategy, wanted, expected = SIMPLEST[name]
    assert simplest(strategy, wanted) == expected


def test_strategy_failures_of_models_become_small() -> None:
    """A failing model has one layer and the least of every size; a failing adapter sits on the smallest model."""
    config = simplest(llama_configs(), lambda c: c["num_key_value_heads"] == c["num_attention_heads"])
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]) == (1, 3, 9)
    assert (config["head_dim"], config["intermediate_size"], config["tie_word_embeddings"]) == (2, 7, False)
    model = simplest(adapted_models(llama_configs()), lambda m: m.target.dropout > 0)
    assert (model.shape.layers, model.target.dropout, model.target.rank <= 2) == (1, 0.1, True)
    rows = simplest(token_rows(), lambda found: len(found) == 2)
    assert [row.ids for row in rows] == [(0, 0)] * 2


@pytest.mark.parametrize("home", STRATEGIES, ids=lambda home: home[1])
def test_type_of_ours_has_its_strategy(home: tuple[str, str]) -> None:
    """`st.from_type` draws each of 15 types, as varied as its own strategy does and not only with its defaults."""
    kind = getattr(__import__(home[0], fromlist=["x"]), home[1])
    assert strategy_for(int) is None
    values = drawn(st.from_type(kind), share=5 / 8)
    assert {type(value) for value in values} == {kind}
    assert len({repr(value) for value in values}) >= 6


def test_type_of_a_configuration_is_drawn_from_the_table_of_settings() -> None:
    """`st.from_type(TrainingConfig)` gives every one of the settings a value that is not its default."""
    default = flatten(TrainingConfig())
    settings = [flatten(config).items() for config in drawn(st.from_type(TrainingConfig))]
    assert {key for each in settings for key, value in each if value != default[key]} == set(SETTINGS)


DRAW = """
from hypothesis import given, settings, strategies as st
from finetune import TrainingConfig
def knows_it():
    found = []
    @given(st.from_type(TrainingConfig))
    @settings(database=None, max_examples=20)
    def draw(config):
        found.append(config)
    draw()
    return sum(config != TrainingConfig() for config in found) > 10
"""
IMPORT_ALONE = """
import sys, hypothesis, hypothesis.strategies
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"pydantic", "numpy", "tokenizers", "yaml", "finetune"}, loaded
"""


def test_type_of_ours_is_known_after_importing_hypothesis_alone() -> None:
    """In a fresh process `import hypothesis` loads nothing of ours that is heavy, and yet knows our types."""
    assert "finetune_strategies.registration:register" in {entry.value for entry in entry_points(group="hypothesis")}
    subprocess.run([sys.executable, "-c", IMPORT_ALONE + DRAW + "assert knows_it()"], check=True, timeout=60)
