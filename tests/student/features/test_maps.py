"""Layer maps: the chapter's own numbers, and what is refused with a list of what the store holds."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stillroom.pipeline.student.features.config import FeaturesConfig
from stillroom.pipeline.student.features.maps import (
    FINAL,
    Shape,
    every_k,
    require_held,
    resolve,
    top_heavy,
    uniform,
)
from stillroom.storage.errors import StudentError, UnsupportedSignal
from stillroom.storage.records import AttentionSpec, HiddenSpec, LayersSpec, SignalSpec, TopKSpec

ALL_60 = SignalSpec(layers=LayersSpec(tuple(range(61)), 64), attention=AttentionSpec(tuple(range(60)), 32))
SHAPE = Shape(layers=12, width=32, heads=4)


def features(**parts: Any) -> FeaturesConfig:
    return FeaturesConfig.model_validate(parts)


def pairs(spec: SignalSpec = ALL_60, shape: Shape = SHAPE, **parts: Any) -> Any:
    (found,) = resolve(features(**parts), spec, shape).values()
    return found


def test_the_chapters_maps_of_12_and_60_layers() -> None:
    assert uniform(12, 60) == tuple((layer, 5 * layer) for layer in range(12))
    found = dict(top_heavy(12, 60))
    assert {layer: found[layer] for layer in (0, 1, 6, 7, 11)} == {0: 0, 1: 2, 6: 20, 7: 30, 11: 59}
    assert every_k(12, 60, 4) == ((0, 0), (4, 20), (8, 40))


def test_blocks_are_numbered_as_transformers_does() -> None:
    """The chapter's layer l is `attentions[l]`, and leaves `hidden_states[l + 1]`."""
    assert pairs(attention={"map": "uniform"})[:3] == ((0, 0), (1, 5), (2, 10))
    assert pairs(hidden={"map": "uniform"})[:3] == ((1, 1), (2, 6), (3, 11))
    assert pairs(relations={"map": "top_heavy"})[-1] == (12, 60)
    assert pairs(hidden={"map": "every_k", "every": 6}) == ((1, 1), (7, 31))
    assert pairs(hidden={"map": "last"}) == ((12, 60),)
    assert pairs(attention={"map": "last"}) == ((11, 59),)
    assert pairs(embeddings={}) == ((0, 0),)
    assert pairs(hidden={"map": [[0, 0], [12, 60], [3, 7]]}) == ((0, 0), (12, 60), (3, 7))


def test_named_maps_go_over_what_is_held() -> None:
    few = SignalSpec(TopKSpec(4), layers=LayersSpec((0, 4, 8, 12), 64), hidden=HiddenSpec(64, "bfloat16"))
    assert pairs(few, hidden={"map": "uniform"}) == ((1, 4), (5, 8), (9, 12))
    assert pairs(few, hidden={"map": "last"}) == ((12, FINAL),), "the hidden part is the teacher's last"
    bare = SignalSpec(hidden=HiddenSpec(64, "bfloat16"))
    assert pairs(bare, relations={"map": "last"}) == ((12, FINAL),)


@given(students=st.integers(1, 40), teachers=st.integers(1, 80), k=st.integers(1, 9))
def test_maps_rise_and_stay_inside(students: int, teachers: int, k: int) -> None:
    for found in (uniform(students, teachers), top_heavy(students, teachers), every_k(students, teachers, k)):
        assert found
        assert [s for s, _ in found] == sorted({s for s, _ in found})
        assert [t for _, t in found] == sorted(t for _, t in found)
        assert 0 <= found[0][0] <= found[-1][0] < students
        assert 0 <= found[0][1] <= found[-1][1] < teachers
    if teachers >= students > 1:
        assert top_heavy(students, teachers)[-1] == (students - 1, teachers - 1)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"hidden": {"map": [[1, 4], [2, 9]]}}, r"features\.hidden\.map .* layers 9, of which the store holds 4, 8"),
        ({"relations": {"map": [[1, 5]]}}, r"features\.relations\.map .* layers 5, of which the store holds 4, 8"),
        ({"attention": {"map": [[0, 0]]}}, r"layers 0, of which the store holds 3, 7 \(signal\.attention\)"),
        ({"attention": {"heads": "per_head"}}, r"the store holds the mean over heads"),
        ({"embeddings": {}}, r"features\.embeddings needs signal\.embeddings, and the store holds layers 4,8"),
    ],
)
def test_what_the_store_lacks(parts: dict[str, Any], says: str) -> None:
    spec = SignalSpec(layers=LayersSpec((4, 8), 32), attention=AttentionSpec((3, 7), 32))
    with pytest.raises(UnsupportedSignal, match=says) as caught:
        require_held(features(**parts), spec)
    assert "\n" not in str(caught.value)


def test_a_store_of_embeddings_alone_has_no_blocks_to_map() -> None:
    with pytest.raises(UnsupportedSignal, match="of the teacher's blocks the store holds none"):
        pairs(SignalSpec(layers=LayersSpec((0,), 32)), hidden={})
    with pytest.raises(UnsupportedSignal, match=r"features\.hidden needs signal\.layers, and the store holds top-4"):
        pairs(SignalSpec(TopKSpec(4)), hidden={"map": "last"})


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"hidden": {"map": [[13, 4]]}}, r"the student's layers 13, which has 0 … 12"),
        ({"attention": {"map": [[12, 3]]}}, r"the student's layers 12, which has 0 … 11"),
        ({"hidden": {"map": [[3, 4], [3, 8]]}}, r"layers 3 more than once"),
        ({"hidden": {"projection": "none"}}, r"32 channels and the teacher 64: set it to auto"),
        ({"attention": {"heads": "per_head"}}, r"4 heads and the store's maps 6: set it to mean"),
    ],
)
def test_what_the_student_lacks(parts: dict[str, Any], says: str) -> None:
    spec = SignalSpec(layers=LayersSpec((4, 8), 64), attention=AttentionSpec((3, 7), 32, "per_head", 6))
    with pytest.raises(StudentError, match=says):
        resolve(features(**parts), spec, SHAPE)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"hidden": {"map": [[1, 2, 3]]}}, r"expected pairs \[student, teacher\] .* got \[1, 2, 3\]"),
        ({"hidden": {"map": [[1, 2], [-1, 2]]}}, r"got \[-1, 2\]"),
        ({"hidden": {"map": []}}, "expected a name or pairs"),
        ({"hidden": {"map": "even"}}, "top_heavy"),
        ({"hidden": {"weight": -1}}, "at least 0"),
        ({"hidden": {"weight": {"from": 0.1, "to": -0.1}}}, "at least 0"),
        ({"attention": {"loss": "mse"}}, "kl"),
        ({"relation": {}}, "Extra inputs"),
    ],
)
def test_a_recipe_that_says_something_else(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        features(**parts)


def test_a_weight_of_zero_is_no_feature() -> None:
    assert features(hidden={"weight": 0}, attention={"weight": {"from": 0, "to": 0.1}}).parts().keys() == {"attention"}
