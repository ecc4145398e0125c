"""codecs/hidden.py and calibration.py: what comes back, within which error, and what is never let in."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.calibration import (
    Calibration,
    calibration_path,
    find_head,
    head_digest,
    head_path,
    load_calibration,
    save_calibration,
)
from stillroom.storage.codecs.hidden import HiddenCodec
from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.records import Float32, HiddenSpec
from tests.strategies import columns_of, round_trip

EPS = float(np.finfo(np.float32).eps)


def calibration(width: int, seed: int = 0) -> Calibration:
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(0.0, 1.0, width).astype(np.float32)
    return Calibration(scale, rng.normal(0.0, 3.0, width).astype(np.float32))


def int8(width: int) -> HiddenCodec:
    return HiddenCodec(HiddenSpec(width, "int8", "ab" * 32), calibration(width))


def int16(width: int) -> HiddenCodec:
    dtype: Any = "int16"
    return HiddenCodec(HiddenSpec(width, dtype, "ab" * 32), calibration(width))


def bfloat16(width: int) -> HiddenCodec:
    return HiddenCodec(HiddenSpec(width, "bfloat16"))


def states(seed: int, rows: int, width: int, size: float, outlier: float) -> Float32:
    """Normal, with one channel of the row far out, as residual streams have them."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(0.0, size, (rows, width))
    hidden[np.arange(rows), rng.integers(0, width, rows)] *= outlier
    return hidden.astype(np.float32)


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "rows": st.integers(0, 7),
    "width": st.sampled_from([1, 2, 33, 576]),
    "size": st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e6, 1e30]),
    "outlier": st.sampled_from([1.0, 60.0, 1e5]),
}


@settings(max_examples=120, deadline=None)
@given(**CASES)
def test_int8_is_within_half_a_step(seed: int, rows: int, width: int, size: float, outlier: float) -> None:
    codec, hidden = int8(width), states(seed, rows, width, size, outlier)
    back = round_trip(codec, hidden)
    scale = columns_of(codec, hidden)["hidden_scale"].values.to_numpy()

    assert back.shape == hidden.shape
    assert back.dtype == np.float32
    assert codec.calibration is not None
    offset = codec.calibration.channel_offset
    step = scale[:, None].astype(np.float64) * codec.calibration.channel_scale
    rounding = 8 * EPS * (np.abs(hidden) + np.abs(offset)) + 127 * 4 * EPS * step
    assert (np.abs(back.astype(np.float64) - hidden) <= step / 2 + rounding).all()
    # The step is as small as the row allows: its largest channel reaches the last code, less what rounding the scale
    # up to bfloat16 takes (2⁻⁷).
    reach = np.abs((hidden - offset) / codec.calibration.channel_scale).max(axis=1, initial=0.0)
    assert (scale * np.float64(127) <= reach * (1 + 2.0**-7) * (1 + 4 * EPS)).all()
    assert (scale.view(np.uint32) & 0xFFFF == 0).all()


@settings(max_examples=120, deadline=None)
@given(**(CASES | {"size": st.sampled_from([0.0, 1e-42, 1e-20, 1.0]), "outlier": st.sampled_from([1.0, 60.0])}))
def test_int16_is_within_half_a_step_of_its_channel(
    seed: int, rows: int, width: int, size: float, outlier: float
) -> None:
    codec, hidden = int16(width), states(seed, rows, width, size, outlier)
    back = round_trip(codec, hidden)
    assert back.shape == hidden.shape
    assert back.dtype == np.float32
    assert codec.calibration is not None
    step = codec.calibration.channel_scale.astype(np.float64)
    rounding = 8 * EPS * (np.abs(hidden) + np.abs(codec.calibration.channel_offset))
    assert (np.abs(back.astype(np.float64) - hidden) <= step / 2 + rounding).all()
    assert np.array_equal(round_trip(codec, back), back), "rounded once, it stays"


def test_int16_refuses_what_it_has_no_codes_for() -> None:
    codec = int16(3)
    assert codec.calibration is not None
    step, offset = codec.calibration.channel_scale, codec.calibration.channel_offset
    hidden = np.tile(offset, (3, 1))
    for sign in (1, -1):
        hidden[1, 2] = offset[2] + np.float32(sign * 16255) * step[2]
        assert np.allclose(round_trip(codec, hidden), hidden, rtol=1e-6)
        hidden[1, 2] = offset[2] + np.float32(sign * 16256) * step[2]
        with pytest.raises(ValueError, match="row 1: channel 2 lies 16,256 steps from its offset, int16 holds 16,255"):
            columns_of(codec, hidden)


@settings(max_examples=120, deadline=None)
@given(**CASES)
def test_bfloat16_is_within_half_an_ulp(seed: int, rows: int, width: int, size: float, outlier: float) -> None:
    hidden = states(seed, rows, width, size, outlier)
    back = round_trip(bfloat16(width), hidden)
    assert (np.abs(back.astype(np.float64) - hidden) <= 2.0**-8 * np.abs(hidden.astype(np.float64)) + 2.0**-134).all()
    assert (back.view(np.uint32) & 0xFFFF == 0).all()
    assert np.array_equal(round_trip(bfloat16(width), back), back), "rounded once, it stays"


def test_bfloat16_ties_go_to_even() -> None:
    hidden = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000]], np.uint32).view(np.float32)
    back = round_trip(bfloat16(4), hidden).view(np.uint32)[0]
    assert [hex(bits) for bits in back] == ["0x3f800000", "0x3f820000", "0x3f810000", "0xbf820000"]


def test_several_sequences_lie_end_to_end_in_rows_of_their_own(tmp_path: Path) -> None:
    """Written and read by another reader, one expression gives the numbers."""
    codec, hidden = int8(5), states(1, 6, 5, 1.0, 9.0)
    rows = np.array([2, 0, 4], np.int64)
    columns = columns_of(codec, hidden, rows)
    table = pa.table(columns, schema=pa.schema(codec.fields()))
    pq.write_table(
        table, tmp_path / "x.parquet", use_dictionary=False, column_encoding=codec.encodings(), compression="zstd"
    )
    read = pq.read_table(tmp_path / "x.parquet")
    assert [len(value) for value in read["hidden_code"]] == [10, 0, 20]
    code = np.concatenate([value.values.to_numpy() for value in read["hidden_code"]]).reshape(-1, 5)
    scale = np.concatenate([value.values.to_numpy() for value in read["hidden_scale"]])[:, None]
    assert codec.calibration is not None
    by_hand = (code - 128) * scale * codec.calibration.channel_scale + codec.calibration.channel_offset
    back = codec.decode({name: read[name].combine_chunks() for name in read.column_names}, rows)
    assert np.allclose(by_hand, back, rtol=1e-6, atol=1e-6)
    assert np.array_equal(back, round_trip(codec, hidden))


def test_high_planes_are_zeros() -> None:
    """What makes 8 bits of an int16, and 16 of a float32."""
    hidden = states(2, 40, 33, 1.0, 60.0)
    code = columns_of(int8(33), hidden)["hidden_code"].values.to_numpy()
    assert code.min() >= 1
    assert code.max() <= 255


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [int8, int16, bfloat16])
def test_what_is_not_finite_is_refused_by_row(make: Any, value: float) -> None:
    hidden = states(3, 4, 6, 1.0, 1.0)
    hidden[2, 5] = value
    codec = make(6)
    with pytest.raises(ValueError, match="row 2: channel 5"):
        columns_of(codec, hidden)


@pytest.mark.parametrize("make", [int8, bfloat16])
def test_numbers_at_the_end_of_float32_are_kept_or_refused(make: Any) -> None:
    codec = make(3)
    hidden = np.ones((2, 3), np.float32)
    hidden[1, 0] = np.finfo(np.float32).max
    with pytest.raises(ValueError, match="row 1"):
        columns_of(codec, hidden)
    hidden[1, 0] = 1e36
    assert np.isfinite(round_trip(codec, hidden)).all()


@pytest.mark.parametrize(
    "hidden",
    [np.zeros((2, 3), np.float64), np.zeros((2, 4), np.float32), np.zeros(3, np.float32)],
    ids=["float64", "wide", "flat"],
)
def test_other_shapes_and_types_are_refused(hidden: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected float32"):
        int8(3).encode(hidden, np.array([len(hidden)], np.int64))


@pytest.mark.parametrize("make", [int8, int16, bfloat16])
@pytest.mark.parametrize("rows", [[3, 1], [2, 3], [4], [2, 2, 0], [1_000_000_000]])
def test_columns_of_other_sizes_are_refused(make: Any, rows: list[int]) -> None:
    codec = make(5)
    columns = columns_of(codec, states(4, 4, 5, 1.0, 1.0), np.array([2, 2], np.int64))
    with pytest.raises(ValueError, match="column hidden"):
        codec.decode(columns, np.array(rows, np.int64))


@pytest.mark.parametrize(
    ("make", "code"), [*((int8, code) for code in (0, 256, -1, 32767, -32768)), (int16, 256), (int16, -32768)]
)
def test_codes_that_cannot_be_are_refused(make: Any, code: int) -> None:
    codec, good = make(2), 512 if make is int16 else 128
    columns = columns_of(codec, np.ones((2, 2), np.float32))
    columns["hidden_code"] = pa.array([[good, good, code, good]], codec.fields()[0].type)
    with pytest.raises(ValueError, match="hidden_code"):
        codec.decode(columns, np.array([2], np.int64))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e38])
def test_scales_that_cannot_be_are_refused(scale: float) -> None:
    codec = int8(2)
    columns = columns_of(codec, np.ones((2, 2), np.float32))
    columns["hidden_scale"] = pa.array([[1.0, scale]], codec.fields()[1].type)
    with pytest.raises(ValueError, match="hidden_scale, row 1"):
        codec.decode(columns, np.array([2], np.int64))


def test_bfloat16_that_is_not_finite_is_refused() -> None:
    codec = bfloat16(2)
    columns = {"hidden": pa.array([[1.0, 1.0, np.nan, 1.0]], codec.fields()[0].type)}
    with pytest.raises(ValueError, match="row 1"):
        codec.decode(columns, np.array([2], np.int64))


@pytest.mark.parametrize(
    ("spec", "vectors"),
    [
        (HiddenSpec(3, "int8", "ab" * 32), None),
        (HiddenSpec(3, "bfloat16"), calibration(3)),
        (HiddenSpec(4, "int8", "ab" * 32), calibration(3)),
        (HiddenSpec(0, "bfloat16"), None),
        (HiddenSpec(3, "int4"), None),  # type: ignore[arg-type]
    ],
)
def test_spec_and_calibration_must_belong_together(spec: HiddenSpec, vectors: Calibration | None) -> None:
    with pytest.raises(ValueError, match=r"hidden\."):
        HiddenCodec(spec, vectors)


@pytest.mark.parametrize(
    ("scale", "offset"),
    [
        ([1.0, 0.0], [0.0, 0.0]),
        ([1.0, -1.0], [0.0, 0.0]),
        ([1.0, np.nan], [0.0, 0.0]),
        ([1.0, 1.0], [0.0, np.inf]),
        ([1.0], [0.0, 0.0]),
        ([], []),
    ],
)
def test_a_calibration_is_positive_and_finite(scale: list[float], offset: list[float]) -> None:
    with pytest.raises(ValueError, match="channel"):
        Calibration(np.array(scale, np.float32), np.array(offset, np.float32))


def test_calibration_comes_back_under_its_digest(tmp_path: Path) -> None:
    files, made = LocalFiles(tmp_path), calibration(576)
    digest = save_calibration(files, made)
    assert save_calibration(files, made) == digest
    assert sha256_hex(files.read(calibration_path(digest))) == digest
    back = load_calibration(files, digest)
    assert np.array_equal(back.channel_scale, made.channel_scale)
    assert np.array_equal(back.channel_offset, made.channel_offset)
    assert save_calibration(files, calibration(576, seed=1)) != digest


def test_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    digest = save_calibration(files, calibration(40))
    data = bytearray(files.read(calibration_path(digest)))
    for at in range(0, len(data), 7):
        data[at] ^= 1
        files.write(calibration_path(digest), bytes(data))
        with pytest.raises(CorruptShard, match=f"{calibration_path(digest)}.*sha256"):
            load_calibration(files, digest)
        data[at] ^= 1
    files.write(calibration_path(digest), bytes(data[:-1]))
    with pytest.raises(CorruptShard, match="sha256"):
        load_calibration(files, digest)
    with pytest.raises(StoreError, match="cannot read"):
        load_calibration(files, "0" * 64)


def _written(files: LocalFiles, table: pa.Table, **options: object) -> str:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, store_schema=False, **options)
    data = sink.getvalue().to_pybytes()
    files.write(calibration_path(sha256_hex(data)), data)
    return sha256_hex(data)


def test_a_file_that_is_no_calibration_is_refused_whatever_its_digest(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    field = [pa.field(name, pa.float32(), nullable=False) for name in ("channel_scale", "channel_offset")]
    good = pa.table([pa.array([1.0, 2.0], pa.float32())] * 2, schema=pa.schema(field))
    load_calibration(files, _written(files, good, compression="none"))

    huge = pa.table([pa.array(np.ones(2**20 + 1, np.float32))] * 2, schema=pa.schema(field))
    other = pa.table([pa.array([1.0], pa.float64())] * 2, names=["channel_scale", "channel_offset"])
    zero = pa.table([pa.array([0.0], pa.float32())] * 2, schema=pa.schema(field))
    digests = [
        _written(files, good, compression="zstd"),
        _written(files, huge, compression="none"),
        _written(files, other, compression="none"),
        _written(files, zero, compression="none"),
    ]
    files.write(calibration_path(sha256_hex(b"PAR1")), b"PAR1")
    for digest in [*digests, sha256_hex(b"PAR1")]:
        with pytest.raises(CorruptShard, match=f"{digest}.*is no calibration"):
            load_calibration(files, digest)


def test_the_head_is_found_by_its_name(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    with pytest.raises(StoreError, match="no output head"):
        find_head(files)
    path = head_path("ab" * 32)
    files.write(path, b"x")
    files.write("_stillroom/identity.json", b"{}")
    assert find_head(files) == path
    assert head_digest(path) == "ab" * 32
    files.write(head_path("cd" * 32), b"y")
    with pytest.raises(StoreError, match="2 output heads"):
        find_head(files)
    for bad in ("head.safetensors", head_path("ab"), f"x/{path}", head_path("AB" * 32)):
        with pytest.raises(StoreError, match="not the name"):
            head_digest(bad)
