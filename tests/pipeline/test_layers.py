"""Layers and attention maps in a recipe: which are meant, what is refused, and the whole path to a store of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.fidelity import require_described, require_taught
from stillroom.pipeline.options import side_of
from stillroom.pipeline.recipe.signal_schema import LayersConfig, SignalConfig
from stillroom.pipeline.rescore import rescore_store
from stillroom.pipeline.sources import _require_readable
from stillroom.storage.care.verify import verify_store
from stillroom.storage.errors import IdentityMismatch, RecipeError, UnsupportedSignal
from stillroom.storage.records import AttentionSpec, LayersSpec, SignalSpec, TopKSpec
from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, distil, sentences

DOCUMENTS = sentences(11, 12)
SHAPE: dict[str, Any] = {"width": 64, "blocks": 12, "heads": 8}


@pytest.mark.parametrize(
    ("signal", "layers", "attention"),
    [
        ({"layers": {"every": 4}}, LayersSpec((4, 8, 12), 64), None),
        ({"layers": {"every": 5, "dtype": "float32"}}, LayersSpec((5, 10), 64, "float32"), None),
        ({"layers": {"layers": [8, 0, 8, 4]}}, LayersSpec((0, 4, 8), 64), None),
        ({"layers": {"every": 6}, "embeddings": True}, LayersSpec((0, 6, 12), 64), None),
        ({"embeddings": True}, LayersSpec((0,), 64), None),
        ({"attention": {"every": 4}}, None, AttentionSpec((3, 7, 11), 1024)),
        (
            {"attention": {"layers": [11, 2], "heads": "per_head", "max_tokens": 99, "dtype": "float32"}},
            None,
            AttentionSpec((2, 11), 99, "per_head", 8, "float32"),
        ),
    ],
)
def test_which_are_meant(signal: dict[str, Any], layers: LayersSpec | None, attention: AttentionSpec | None) -> None:
    """The map of block 4 is number 3, what leaves it is 4: as transformers counts."""
    assert SignalConfig.model_validate(signal).spec(**SHAPE) == SignalSpec(TopKSpec(64), None, None, layers, attention)


def refusal(tmp_path: Path, **over: Any) -> str:
    setup = Setup.make(tmp_path, DOCUMENTS, **over)
    with pytest.raises(RecipeError) as caught:
        distil(setup)
    assert not (tmp_path / "store").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_students_may_name_the_layers(tmp_path: Path) -> None:
    """The recipe has them from then on: whatever shows it shows the numbers."""
    pairs = {"hidden": {"map": [[1, 2]]}, "relations": {"map": [[1, 1]]}, "attention": {"map": [[0, 0]]}}
    setup = Setup.make(
        tmp_path, DOCUMENTS, signal__layers={"named_by": "students", "dtype": "float32"},
        signal__attention={"layers": [0]}, students__0__features=pairs,
    )  # fmt: skip
    recipe = setup.recipe()
    assert recipe.signal.layers == LayersConfig(layers=(1, 2), dtype="float32")
    assert recipe.signal == SignalConfig.model_validate(recipe.signal.model_dump())


def test_a_sequence_that_could_not_be_read_back_is_refused_with_its_size() -> None:
    """32 heads of 32 layers at 1,024 tokens: 1.07 GB in one sequence."""
    heavy = SignalSpec(attention=AttentionSpec(tuple(range(32)), 1024, "per_head", 32))
    with pytest.raises(RecipeError, match=r"take 1,049,600 bytes a token before compression, 1,074,790,400 in a seq"):
        _require_readable(heavy, 1024)
    _require_readable(heavy, 500)
    _require_readable(SignalSpec(layers=LayersSpec(tuple(range(0, 33, 4)), 4096)), 1024)
    with pytest.raises(RecipeError, match="keep fewer layers"):
        _require_readable(SignalSpec(layers=LayersSpec(tuple(range(33)), 4096)), 1024)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"signal__layers": {}}, "expected one alone of layers: [4, 8], every: 4, named_by: students"),
        ({"signal__layers": {"layers": [1], "every": 2}}, "expected one alone of layers"),
        ({"signal__layers": {"layers": []}}, "expected one alone of layers"),
        ({"signal__layers": {"layers": [1], "named_by": "students"}}, "expected one alone of layers"),
        ({"signal__layers": {"named_by": "students"}}, "no student's features.hidden or relations names a layer"),
        (
            {"signal__layers": {"named_by": "students"}, "students__0__features": {"hidden": {"map": "uniform"}}},
            "features.hidden.map of student cut is uniform, which goes over the layers that the store holds",
        ),
        ({"signal__layers": {"layers": [-1]}}, "signal.layers.layers.0"),
        ({"signal__layers": {"layers": [1, 3]}}, "asks for layer 3, expected 0 to 2 (the teacher has 2 blocks)"),
        ({"signal__layers": {"every": 3}}, "every so many, more than there are, expected 0 to 2"),
        ({"signal__attention": {"layers": [2]}}, "asks for layer 2, expected 0 to 1 (the teacher has 2 blocks)"),
        ({"signal__attention": {"every": 1, "max_tokens": 16}}, "at that window maps take 16 numbers a token"),
        ({"signal__attention": {"every": 1}, "teacher__attention": "sdpa"}, "teacher.attention is sdpa"),
        ({"signal__embeddings": True, "teacher__compile": True}, "teacher.compile with signal.layers"),
        ({"signal": {"topk": None}}, "nothing is kept"),
    ],
)
def test_what_cannot_be_is_refused_before_a_store_is_founded(
    tmp_path: Path, over: dict[str, Any], message: str
) -> None:
    assert message in refusal(tmp_path, **over)


def test_from_a_recipe_to_a_store_of_every_part(tmp_path: Path) -> None:
    signal = {
        "topk": {"k": 8}, "sampled": {"draws": 9}, "hidden": {"dtype": "bfloat16"}, "layers": {"every": 1},
        "attention": {"every": 2, "heads": "per_head"}, "embeddings": True,
    }  # fmt: skip
    # Not tied: a random teacher that is would repeat what it reads, which verify takes for shifted rows.
    setup = Setup.make(tmp_path, DOCUMENTS, signal=signal, teacher={"tie_word_embeddings": False})
    distil(setup)
    store = open_store(str(tmp_path / "store"))
    spec = store.identity.signal
    assert (spec.layers, spec.attention) == (LayersSpec((0, 1, 2), 32), AttentionSpec((1,), 1024, "per_head", 4))
    assert store.identity.format == 3
    assert verify_store(store.uri)["problems"] == []
    for stored in store.sequences():
        assert stored.signal is not None
        assert stored.signal.layers is not None
        assert stored.signal.attention is not None
        assert len(stored.signal.layers) == len(stored.signal.attention) == stored.sequence.rows
        assert stored.signal.hidden is not None
        np.testing.assert_array_equal(stored.signal.layers[:, -1], stored.signal.hidden)
        assert abs(float(stored.signal.attention.dense()[0, :, -1].sum()) - 4) < 0.1
    again = rescore_store(store.uri, 2, device="cpu")
    assert again["problems"] == []
    for unit in again["rescored"]["by_unit"]:
        assert (unit["bit_equal"], unit["layers_error"], unit["attention_distance"]) == (True, 0, 0)
    require_described(setup.recipe(), store)
    for other in ("signal.layers.every=2", "signal.embeddings=false", "signal.attention.heads=mean"):
        with pytest.raises(IdentityMismatch, match="signal"):
            require_described(setup.recipe(other), store)


def test_layers_alone_are_kept_and_teach_nobody(tmp_path: Path) -> None:
    setup = Setup.make(tmp_path, DOCUMENTS, signal={"topk": None, "layers": {"layers": [1]}}, fidelity={"positions": 0})
    distil(setup)
    store = open_store(str(tmp_path / "store"))
    assert verify_store(store.uri)["problems"] == []
    with pytest.raises(UnsupportedSignal, match=r"the store holds layers 1 bfloat16 \(32\) alone"):
        require_taught(setup.recipe().students[0], store.identity.signal, where=store.uri)


def test_a_plan_prices_them_beside_every_choice(tmp_path: Path) -> None:
    from stillroom.pipeline.cli import main

    beside = {"layers": {"every": 1}, "attention": {"every": 1}}
    setup = Setup.make(tmp_path / "whole", DOCUMENTS[:6], signal={"topk": {"k": 8}} | beside)
    whole = _plan(setup, main)
    assert whole["recipe_keeps"].startswith("top-8 (1/8 nat) + layers 1,2 bfloat16 (32) + attention 0,1")
    setup = Setup.make(tmp_path / "alone", DOCUMENTS[:6], signal={"topk": None} | beside, students=[])
    alone = _plan(setup, main)
    side = alone["bytes_per_token"]
    assert alone["recipe_keeps"] == whole["recipe_keeps"].partition(" + ")[2]
    assert alone["recipe_misses"] == "at T = 1 not served"
    assert side > 2 * 32  # two layers of 32 channels take more than a byte for each
    assert all(row["keeps"].endswith(alone["recipe_keeps"]) for row in whole["options"])
    assert min(row["bytes_per_token"] for row in whole["options"]) > side + 10


def _plan(setup: Setup, main: Any) -> dict[str, Any]:
    import contextlib
    import io
    import json

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["plan", str(setup.folder / "recipe.yaml"), "--json"]) == 0
    estimate: dict[str, Any] = json.loads(printed.getvalue())["estimate"]
    return estimate


def test_what_comes_beside_the_output() -> None:
    spec = SignalSpec(TopKSpec(4), layers=LayersSpec((1,), 8), attention=AttentionSpec((0,), 8))
    assert side_of(spec) == SignalSpec(layers=spec.layers, attention=spec.attention)
    assert side_of(SignalSpec(TopKSpec(4))).as_dict() == {}
