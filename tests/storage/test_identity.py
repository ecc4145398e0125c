"""identity.py: an id is the same for as long as there are stores, in the format that it was founded in."""

import json
from dataclasses import replace
from typing import Any

import pytest

from stillroom.storage.errors import FormatMismatch, IdentityMismatch
from stillroom.storage.identity import Identity
from stillroom.storage.records import (
    AttentionSpec,
    HiddenSpec,
    LayersSpec,
    NucleusSpec,
    SampledSpec,
    SignalSpec,
    TopKSpec,
)
from tests.strategies import tiny_identity

ALL = SignalSpec(TopKSpec(8, None, NucleusSpec(0.9, 2.0), "packed"), SampledSpec(5), HiddenSpec(16, "int8", "ab" * 32))

#: Ids that stores out there carry. A change here loses every one of them.
IDS = [
    (replace(tiny_identity(gap_step=1 / 8), format=1), "2260e4ab4c183430ee34c1073cb540ae"),
    (replace(tiny_identity(gap_step=None), format=1), "727ce5d8ae7f7ae1d4ff3698fdb54bc6"),
    (tiny_identity(gap_step=1 / 8), "16a3e10442a699717106177f64ef88ad"),
    (tiny_identity(gap_step=None), "bcb2ee3a905b5288fb4fd669a0f0d88e"),
    (tiny_identity(signal=ALL), "a5c91d7596f31f9ab36b436ab135a259"),
]


@pytest.mark.parametrize(("identity", "stated"), IDS)
def test_ids_stay(identity: Identity, stated: str) -> None:
    assert identity.id == stated
    assert replace(identity, teacher="called otherwise").id == stated


@pytest.mark.parametrize(("identity", "stated"), IDS)
def test_json_and_back(identity: Identity, stated: str) -> None:
    again = Identity.from_json(identity.to_json())
    assert again == identity
    assert again.id == stated
    assert json.loads(identity.to_json())["format"] == identity.format


def test_a_bit_of_the_file_that_is_flipped_is_told_or_changes_nothing() -> None:
    """All of them, also of the teacher's name, which is no part of the id."""
    identity = tiny_identity()
    data = bytearray(identity.to_json().encode())
    silent = 0
    for place in range(8 * len(data)):
        data[place // 8] ^= 1 << place % 8
        try:
            found = Identity.from_json(data.decode())
        except (FormatMismatch, IdentityMismatch, KeyError, TypeError, ValueError):
            found = None
        assert found in (None, identity), bytes(data)
        silent += found is not None
        data[place // 8] ^= 1 << place % 8
    assert silent < len(data), "spaces that became other spaces"


def test_a_file_without_a_format_is_of_format_1() -> None:
    """Release 1 did not write it; its k and gap_step stand in `signal` itself."""
    fields = _fields(IDS[0][0])
    assert fields["signal"] == {"k": 4, "gap_step": 0.125}
    del fields["format"]
    read = Identity.from_json(json.dumps(fields))
    assert (read.format, read.id, read.signal) == (1, IDS[0][1], SignalSpec(TopKSpec(4, 1 / 8)))


def test_the_format_is_not_part_of_what_is_compared() -> None:
    """A recipe asks for today's format; a store of an older one holds the same numbers."""
    old, new = IDS[0][0], IDS[2][0]
    assert old.id != new.id
    old.require_equal(new, "here")
    new.require_equal(old, "here")


@pytest.mark.parametrize("version", [0, 4, "2", None, [1]])
def test_another_format_is_refused(version: Any) -> None:
    with pytest.raises(FormatMismatch, match=r"the store is of format .*, this release reads \(1, 2, 3\)"):
        Identity.from_json(json.dumps(_fields(tiny_identity()) | {"format": version}))


INNER = SignalSpec(
    TopKSpec(4), layers=LayersSpec((0, 4, 8), 16), attention=AttentionSpec((3, 7), 512, "per_head", 9, "uint8")
)


def test_layers_and_attention_make_format_3_and_nothing_else_does() -> None:
    """Releases that do not know them say so; what they do know stays in the format that they read."""
    for part in ("layers", "attention"):
        spec = SignalSpec(**{part: getattr(INNER, part)})
        assert tiny_identity(signal=spec).format == 3
    identity = tiny_identity(signal=INNER)
    again = Identity.from_json(identity.to_json())
    assert (again, again.id, again.format) == (identity, "36b9dc49237d3c388809d3c8e8e4add5", 3)
    assert _fields(identity)["signal"]["layers"] == {"layers": [0, 4, 8], "width": 16, "dtype": "bfloat16"}
    assert replace(identity, signal=SignalSpec(TopKSpec(4))) == tiny_identity()
    assert replace(identity, format=2).format == 3
    for signal, version in ((INNER, 2), (SignalSpec(TopKSpec(4)), 3)):
        with pytest.raises(IdentityMismatch, match=f"format {version} does not have such a signal"):
            Identity.from_json(json.dumps(_fields(tiny_identity(signal=signal)) | {"format": version}))


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("layers", {"width": 0}),
        ("layers", {"layers": [-1, 4]}),
        ("layers", {"layers": [2**20]}),
        ("layers", {"layers": ["4"]}),
        ("attention", {"max_tokens": 0}),
        ("attention", {"max_tokens": 2**30}),
        ("attention", {"head_count": 2**20}),
        ("attention", {"layers": [1.5]}),
    ],
)
def test_layers_that_cannot_be_are_refused(part: str, changed: dict[str, Any]) -> None:
    fields = _fields(tiny_identity(signal=INNER))
    fields["signal"][part] |= changed
    spec = SignalSpec.from_dict(fields["signal"])
    with pytest.raises(ValueError, match="expected"):
        Identity.from_json(tiny_identity(signal=spec).to_json())


def test_in_words() -> None:
    assert INNER.in_words() == (
        "top-4 (1/8 nat) + layers 0,4,8 bfloat16 (16) + attention 3,7 (uint8, 9 heads, up to 512 tokens)"
    )
    many = SignalSpec(layers=LayersSpec(tuple(range(4, 33, 4)), 16, "float32"), attention=AttentionSpec((0,), 8))
    assert many.in_words() == "layers 4,8..32 float32 (16) + attention 0 (uint8, mean of heads, up to 8 tokens)"


@pytest.mark.parametrize(
    "changed",
    [
        {"vocabulary": 41},
        {"signal": {"topk": {"k": 5, "gap_step": 0.125, "layout": "plain"}}},
        {"signal": {"topk": {"k": 4, "gap_step": 0.125, "layout": "packed"}}},
        {"signal": {"topk": {"k": 4, "gap_step": 0.125, "layout": "plain"}, "sampled": {"draws": 3}}},
    ],
)
def test_damage_is_told(changed: dict[str, Any]) -> None:
    with pytest.raises(IdentityMismatch, match="identity file is damaged"):
        Identity.from_json(json.dumps(_fields(tiny_identity()) | changed))


@pytest.mark.parametrize(
    "signal",
    [
        {"k": 4, "gap_step": 0.125, "layout": "packed"},
        {"k": 4, "gap_step": 0.125, "nucleus": {"mass": 0.5}},
        {"k": 4, "gap_step": 0.25},
    ],
)
def test_what_format_1_did_not_know_is_damage_in_it(signal: dict[str, Any]) -> None:
    """Its id hashes k and gap_step alone, and would not tell."""
    with pytest.raises(IdentityMismatch, match="identity file is damaged"):
        Identity.from_json(json.dumps(_fields(IDS[0][0]) | {"signal": signal}))


@pytest.mark.parametrize(("number", "version"), [(0, 2), (2, 1)])
def test_a_signal_written_in_another_formats_words_is_refused(number: int, version: int) -> None:
    with pytest.raises(TypeError):
        Identity.from_json(json.dumps(_fields(IDS[number][0]) | {"format": version}))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (SignalSpec(TopKSpec(4, 1 / 8, NucleusSpec(0.9))), "asked top-4 (1/8 nat, nucleus 0.9)"),
        (SignalSpec(TopKSpec(4, 1 / 8, layout="packed")), "asked top-4 (1/8 nat, packed)"),
        (SignalSpec(TopKSpec(4, 1 / 8), SampledSpec(7)), "asked top-4 (1/8 nat) + 7 draws"),
        (SignalSpec(hidden=HiddenSpec(16, "bfloat16")), "asked hidden bfloat16 (16)"),
    ],
)
def test_a_difference_in_the_signal_is_said_in_words(asked: SignalSpec, words: str) -> None:
    with pytest.raises(IdentityMismatch) as caught:
        tiny_identity().require_equal(tiny_identity(signal=asked), "here")
    assert f"(signal: store top-4 (1/8 nat), {words})" in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NucleusSpec(0.9, 1.0), NucleusSpec(0.9, 2.0)),
        (NucleusSpec(0.9), NucleusSpec(0.9000001)),
    ],
)
def test_no_difference_is_too_small_to_be_told(one: NucleusSpec, other: NucleusSpec) -> None:
    held, asked = (tiny_identity(signal=SignalSpec(TopKSpec(4, 1 / 8, nucleus))) for nucleus in (one, other))
    with pytest.raises(IdentityMismatch) as caught:
        held.require_equal(asked, "here")
    store, _, recipe = str(caught.value).partition("signal: store ")[2].partition(")")[0].partition(", asked ")
    assert store != recipe, "and each is said as it is"


def _fields(identity: Identity) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(identity.to_json())
    return fields
