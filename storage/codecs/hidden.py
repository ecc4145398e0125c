"""The `hidden` codec: the teacher's final hidden state after its last norm, in steps of a channel or in bfloat16.

Enters: hidden states of R positions, float32 [R, D]. Leaves: plain Arrow columns, and back. Costs: about six passes to
encode and three to decode.

    int16      hidden_code   int16    D a position
    int8       hidden_code   int16    codes 1 … 255, D a position
               hidden_scale  float32  one a position, rounded up to bfloat16
    bfloat16   hidden        float32  D a position, rounded to bfloat16

    int16: hidden = (hidden_code − 16512) · channel_scale[c] + channel_offset[c]
    int8:  hidden = (hidden_code − 128) · hidden_scale · channel_scale[c] + channel_offset[c]

Error |hidden − exact|, and float32's rounding beside it: int16 ≤ channel_scale[c] / 2, int8 ≤ hidden_scale ·
channel_scale[c] / 2, bfloat16 ≤ 2⁻⁸ |exact|.

With the teacher's output head these give all V logits (pipeline/student/full_logits.py), so the signal is as good at
T = 8 as at 1. Measured on SmolLM2-135M (D = 576): int8 525.4 bytes a position, int16 546.5 at three quarters of its
error or 521.5 at the same, bfloat16 820.9 at a third. int16 is the better one: entropy coding takes the few large
channels at their size, so that each channel can have the step that the logits need, a function of the head alone
(workers/head.py, `steps_of`), and one outlier does not coarsen its whole row.

Why int16 for codes of 8 bits: Parquet has no 8-bit type, and as byte planes the high one is all zeros and costs nothing
(int32 and fixed-size binary take the same to a byte). Codes around 0 would fill it with signs: 853 bytes. Why float32
for bfloat16: every reader knows it, and its two low planes are zeros; the bits as int16 take 1,045 bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom.storage.calibration import Calibration
from stillroom.storage.codecs.columns import Counts, element, flat, flat_list, lists, require_lengths
from stillroom.storage.records import Float32, HiddenSpec

#: By dtype: the code of the channel's offset itself, and the largest step away from it. Codes are positive and most
#: share their high byte, as 128 is in the middle of one.
ZERO = {"int8": 128, "int16": 2**14 + 128}
LARGEST = {"int8": 127, "int16": 2**14 - 129}


@dataclass(frozen=True)
class HiddenCodec:
    """Encodes hidden states of one spec.

    calibration: of int8 and int16, None for bfloat16. Raises ValueError where the two do not belong together.
    """

    spec: HiddenSpec
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.spec.dtype not in ("bfloat16", *ZERO):
            raise ValueError(f"hidden.dtype is {self.spec.dtype!r}, expected int8, int16 or bfloat16")
        if (self.calibration is not None) != (self.spec.dtype in ZERO):
            held = "a" if self.calibration else "no"
            raise ValueError(f"hidden.dtype {self.spec.dtype} with {held} calibration; all but bfloat16 have one")
        if self.spec.width < 1 or (self.calibration and self.calibration.width != self.spec.width):
            found = self.calibration.width if self.calibration else "none"
            raise ValueError(f"hidden.width is {self.spec.width}, the calibration's {found}")

    def fields(self) -> list[pa.Field]:
        if self.calibration is None:
            return [flat_list("hidden", pa.float32())]
        scale = [flat_list("hidden_scale", pa.float32())] if self._scaled else []
        return [flat_list("hidden_code", pa.int16()), *scale]

    @property
    def _scaled(self) -> bool:
        return self.spec.dtype == "int8"

    def encodings(self) -> dict[str, str]:
        return {element(field.name): "BYTE_STREAM_SPLIT" for field in self.fields()}

    def encode(self, block: Float32, rows: Counts) -> list[pa.Array]:
        """See `Codec`. One NaN would poison the scale of its row, so nothing that is not finite gets in."""
        self._check(block)
        if self.calibration is None:
            return [lists(to_bfloat16(block).ravel(), rows * self.spec.width, pa.float32())]
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused
            steps_RD = block - self.calibration.channel_offset
            steps_RD /= self.calibration.channel_scale
        scale = [lists(self._scale(steps_RD), rows, pa.float32())] if self._scaled else []
        return [lists(self._codes(steps_RD).ravel(), rows * self.spec.width, pa.int16()), *scale]

    def decode(self, columns: Mapping[str, pa.Array], rows: Counts) -> Float32:
        """float32 [R, D]; of bfloat16, a view of the column."""
        flats = {field.name: flat(columns[field.name]) for field in self.fields()}
        shape = int(rows.sum()), self.spec.width
        if self.calibration is None:
            values, lengths = flats["hidden"]
            require_lengths("hidden", lengths, rows * self.spec.width)
            hidden: Float32 = values.reshape(shape)
            require_good("hidden", np.isfinite(hidden), "finite numbers")
            return hidden
        codes, lengths = flats["hidden_code"]
        require_lengths("hidden_code", lengths, rows * self.spec.width)
        scale = None
        if self._scaled:
            scale, lengths = flats["hidden_scale"]
            require_lengths("hidden_scale", lengths, rows)
            self._require_scale(scale)
        return self._restore(codes.reshape(shape), scale)

    def _check(self, block: Float32) -> None:
        if block.dtype != np.float32 or block.ndim != 2 or block.shape[1] != self.spec.width:
            raise ValueError(f"hidden {block.dtype} {list(block.shape)}, expected float32 [R, {self.spec.width}]")
        good = np.isfinite(block)
        if not good.all():
            row, channel = divmod(int(np.argmin(good)), self.spec.width)
            raise ValueError(f"row {row}: channel {channel} of the hidden state is {block[row, channel]}")

    def _scale(self, steps_RD: Float32) -> Float32:
        """The scale of each row, by which `steps` are divided in place: its largest channel just reaches the last code.

        Clipping does not pay: at 0.9 of that the error of the logits is five times as large.
        """
        scale_R = round_up(np.maximum(steps_RD.max(axis=1), -steps_RD.min(axis=1)) / np.float32(LARGEST["int8"]))
        self._require_scale(scale_R)
        steps_RD /= np.where(scale_R == 0, np.float32(1), scale_R)[:, None]
        return scale_R

    def _codes(self, steps_RD: Float32) -> NDArray[np.int16]:
        """Rounded in place. Raises ValueError naming the row that has no codes."""
        np.rint(steps_RD, out=steps_RD)
        largest = LARGEST[self.spec.dtype]
        if max(steps_RD.max(initial=0), -steps_RD.min(initial=0)) > largest:
            row, channel = divmod(int(np.abs(steps_RD).argmax()), self.spec.width)
            raise ValueError(
                f"row {row}: channel {channel} lies {abs(steps_RD[row, channel]):,.0f} steps from its offset, "
                f"{self.spec.dtype} holds {largest:,}; hidden.dtype bfloat16 holds any"
            )
        steps_RD += np.float32(ZERO[self.spec.dtype])
        return steps_RD.astype(np.int16)

    def _restore(self, codes_RD: NDArray[np.int16], scale_R: Float32 | None) -> Float32:
        """What the codes stand for. Raises ValueError where a code cannot be."""
        assert self.calibration is not None
        zero, largest = ZERO[self.spec.dtype], LARGEST[self.spec.dtype]
        low, high = codes_RD.min(initial=zero), codes_RD.max(initial=zero)
        if low < zero - largest or high > zero + largest:
            raise ValueError(f"column hidden_code holds {low} … {high}, expected {zero - largest} … {zero + largest}")
        hidden_RD = codes_RD.astype(np.float32)
        hidden_RD -= np.float32(zero)
        if scale_R is not None:
            hidden_RD *= scale_R[:, None]
        hidden_RD *= self.calibration.channel_scale
        hidden_RD += self.calibration.channel_offset
        return hidden_RD

    def _require_scale(self, scale_R: Float32) -> None:
        """Raises ValueError naming the row whose scale is none, or gives numbers that float32 does not hold."""
        assert self.calibration is not None
        widest = LARGEST["int8"] * max(1.0, float(self.calibration.channel_scale.max()))
        reach_R = scale_R.astype(np.float64) * widest + float(np.abs(self.calibration.channel_offset).max())
        good_R = (scale_R >= 0) & (reach_R < float(np.finfo(np.float32).max))
        require_good("hidden_scale", good_R, "a scale whose 127-fold float32 holds")


def round_up(positive: Float32) -> Float32:
    """The next bfloat16 from here up, as float32. Two of four byte planes are then zeros: 1.2 bytes instead of 3.2."""
    bits = positive.view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def to_bfloat16(hidden_RD: Float32, name: str = "hidden") -> Float32:
    """Rounded to nearest, ties to even, as float32. Raises ValueError naming a row beyond bfloat16's range."""
    bits = np.ascontiguousarray(hidden_RD).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: Float32 = ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)
    require_good(name, np.isfinite(rounded), "numbers in bfloat16's range")
    return rounded


def require_good(name: str, good: NDArray[Any], expected: str) -> None:
    """Raises ValueError naming the first row of a column where something is not good."""
    if not good.all():
        row = int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
        raise ValueError(f"column {name}, row {row}: expected {expected}")
