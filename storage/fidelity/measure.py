"""How faithful a store is, as numbers: what its signal makes of a student's gradient, against full-vocabulary KD.

Enters: the teacher's full logits at a few positions, and what a store decodes there. Leaves: one row per tier and
temperature, and the teacher's own noise band. Costs: one position at a time, about twelve [V] buffers of float64
beside what is given (15 MB at V = 152k).

P positions, V vocabulary, D hidden width. A gradient depends on the student, so the student is stated: its logits
are s = z + ε with ε ~ N(0, 1), seeded by sequence and position alone. storage/fidelity/gradient.py has the formulas
of one position. Sums are float64 and means go through `math.fsum`, so that neither the order of positions nor how they
are cut into blocks changes a bit (rebuilt logits are as reproducible as the product that makes them).
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from math import fsum, isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.fidelity.gradient import Key as Key
from stillroom.storage.fidelity.gradient import Numbers, Point, reference_noise
from stillroom.storage.records import Float32, Signal

TIERS = ("topk", "sampled", "hidden", "topk+sampled")
TEMPERATURES: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)

#: Standard deviation of the reference student's logits around the teacher's, in nats.
REFERENCE_SPREAD = 1.0

#: Rows whose logits are rebuilt at once: 20 MB at V = 152k.
_REBUILT_ROWS = 32

#: Floats [P, V], or what makes [R, V] from hidden states [R, D]: `lambda hidden: hidden @ head.T`.
FullLogits = NDArray[Any] | Callable[[Float32], NDArray[Any]]

#: float32 [P, V] and [P, V], and the keys of the P positions: see `storage.truth.Truth.twice`.
Scored = tuple[Float32, Float32, Seq[Key]]


@dataclass(frozen=True)
class Measured:
    """One tier at one temperature, over the sampled positions.

    retained_mass: mean of Σ_{i kept} p_i under the truth; truncation_loss_nats: mean of its −log. Draws keep the ids
        drawn, hidden states keep all.
    kl_added_nats, kl_added_worst_nats: KL(p ‖ p̂) over the kept ids and the tail bucket, what rounding added (hidden:
        over all ids); None for draws, which are not a rounded p.
    gradient_angle_deg, gradient_norm_ratio: means over positions of the angle between this tier's gradient and that
        of full KD, and of |this tier's| / |full KD's|, at the reference student.
    """

    tier: str
    temperature: float
    positions: int
    retained_mass: float
    truncation_loss_nats: float
    kl_added_nats: float | None
    kl_added_worst_nats: float | None
    gradient_angle_deg: float
    gradient_norm_ratio: float


@dataclass(frozen=True)
class Fidelity:
    """Rows by tier, then temperature. reference_spread: of the student's logits around the teacher's, in nats."""

    rows: tuple[Measured, ...]
    reference_spread: float = REFERENCE_SPREAD

    def row(self, tier: str, temperature: float) -> Measured | None:
        """What was measured at exactly this temperature; nothing is interpolated."""
        return next((r for r in self.rows if r.tier == tier and r.temperature == temperature), None)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        student = f"teacher's logits + N(0, {self.reference_spread:g}²), seeded by sequence and position"
        return {"reference_student": student, "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True)
class Noise:
    """A teacher against itself at one temperature: KL between two scorings, and the angle of the second's full KD
    gradient against the first's."""

    temperature: float
    kl_nats: float
    kl_worst_nats: float
    gradient_angle_deg: float


@dataclass(frozen=True)
class NoiseBand:
    """The same positions scored twice. max_logit_difference: worst |Δlogit| over all of them."""

    positions: int
    max_logit_difference: float
    rows: tuple[Noise, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True, eq=False)
class Block:
    """P positions: the truth, and what a store says there.

    truth: float32 [P, V]. signal: P rows. keys: sequence digest and position of each.
    full_logits: of the hidden part; None leaves that tier out. An array is measured as it is, as a student rebuilds it;
        what a function makes gets the kept logits put in place.
    """

    truth: Float32
    signal: Signal
    keys: Seq[Key]
    full_logits: FullLogits | None = None


def measure(
    truth_PV: Float32,
    signal: Signal,
    *,
    keys: Seq[Key],
    vocabulary: int,
    temperatures: Seq[float] = TEMPERATURES,
    full_logits: FullLogits | None = None,
    spread: float = REFERENCE_SPREAD,
) -> Fidelity:
    """The fidelity of one block; see `measure_blocks`."""
    block = Block(truth_PV, signal, keys, full_logits)
    return measure_blocks([block], vocabulary=vocabulary, temperatures=temperatures, spread=spread)


def measure_blocks(
    blocks: Iterable[Block],
    *,
    vocabulary: int,
    temperatures: Seq[float] = TEMPERATURES,
    spread: float = REFERENCE_SPREAD,
) -> Fidelity:
    """The fidelity of every tier that the signals hold, at each temperature in 1 … 10; no rows without positions.

    Draws, alone or beside a top-k, are measured at T = 1 alone, hidden states where `full_logits` is given. One block
    is held at a time.
    spread: of the reference student, in nats.
    Raises ValueError where the truth is not finite [P, V], where parts are not aligned with it or name ids outside
    the vocabulary, and for temperatures outside 1 … 10.
    """
    _check_temperatures(temperatures)
    found: dict[tuple[int, float], list[Numbers]] = {}
    for block in blocks:
        _check_block(block, vocabulary)
        for place, (truth_V, rebuilt_V) in enumerate(zip(block.truth, _rebuilt(block), strict=True)):
            noise_V = spread * reference_noise(block.keys[place], vocabulary)
            for temperature in temperatures:
                point = Point.of(truth_V, noise_V, temperature)
                for tier, numbers in _tiers(point, block.signal, place, rebuilt_V):
                    found.setdefault((TIERS.index(tier), float(temperature)), []).append(numbers)
    return Fidelity(tuple(_summary(TIERS[tier], t, values) for (tier, t), values in sorted(found.items())), spread)


def noise(
    scored: Iterable[Scored],
    *,
    vocabulary: int,
    temperatures: Seq[float] = TEMPERATURES,
    spread: float = REFERENCE_SPREAD,
) -> NoiseBand:
    """The noise band of positions scored twice, as blocks of (in a batch, alone, keys); one block is held at a time.

    Raises ValueError where the two are not finite [P, V], and for temperatures outside 1 … 10.
    """
    _check_temperatures(temperatures)
    found: dict[float, list[Numbers]] = {float(t): [] for t in sorted(temperatures)}
    positions, largest = 0, 0.0
    for truth_PV, again_PV, keys in scored:
        _check_logits("truth", truth_PV, len(keys), vocabulary)
        _check_logits("second scoring", again_PV, len(keys), vocabulary)
        positions += len(keys)
        for key, truth_V, again_V in zip(keys, truth_PV, again_PV, strict=True):
            largest = max(largest, float(np.abs(truth_V.astype(np.float64) - again_V).max()))
            noise_V = spread * reference_noise(key, vocabulary)
            for temperature, values in found.items():
                values.append(Point.of(truth_V, noise_V, temperature).hidden(again_V))
    rows = [Noise(t, *_kl(values), _mean([n.angle_deg for n in values])) for t, values in found.items() if values]
    return NoiseBand(positions, largest, tuple(rows))


def _tiers(point: Point, signal: Signal, place: int, rebuilt_V: NDArray[Any] | None) -> Iterator[tuple[str, Numbers]]:
    topk = None
    if signal.topk is not None:
        kept = slice(0, int(signal.topk.kept[place]))
        topk = signal.topk.ids[place, kept], signal.topk.logits[place, kept], signal.topk.tail_lse[place]
        yield "topk", point.topk(*topk)
    if signal.sampled is not None and point.temperature == 1.0:
        drawn = signal.sampled.counts[place] > 0
        draws = signal.sampled.ids[place, drawn], signal.sampled.counts[place, drawn]
        yield "sampled", point.sampled(*draws)
        if topk is not None:
            yield "topk+sampled", point.topk(*topk, draws)
    if rebuilt_V is not None:
        yield "hidden", point.hidden(rebuilt_V)


def _rebuilt(block: Block) -> Iterator[NDArray[Any] | None]:
    """Rebuilt logits [V] row by row; None for every row where none are given."""
    full, topk = block.full_logits, block.signal.topk
    for start in range(0, len(block.truth), _REBUILT_ROWS):
        places = range(start, min(start + _REBUILT_ROWS, len(block.truth)))
        if full is None:
            yield from (None for _ in places)
            continue
        rows = slice(places.start, places.stop)
        if callable(full):
            assert block.signal.hidden is not None
            part = np.array(full(block.signal.hidden[rows]))
        else:
            part = full[rows]
        _check_logits("rebuilt logits", part, len(places), block.truth.shape[1])
        for place, row_V in zip(places, part, strict=True):
            if topk is not None and callable(full):
                kept = slice(0, int(topk.kept[place]))
                row_V[topk.ids[place, kept]] = topk.logits[place, kept]
            yield row_V


def _mean(values: list[float]) -> float:
    """Of those that are numbers; exact whatever their order."""
    there = [v for v in values if not isnan(v)]
    return fsum(there) / len(there) if there else float("nan")


def _summary(tier: str, temperature: float, values: list[Numbers]) -> Measured:
    kl, kl_worst = (None, None) if "sampled" in tier else _kl(values)
    return Measured(
        tier,
        temperature,
        len(values),
        retained_mass=_mean([n.mass for n in values]),
        truncation_loss_nats=_mean([n.truncation_loss for n in values]),
        kl_added_nats=kl,
        kl_added_worst_nats=kl_worst,
        gradient_angle_deg=_mean([n.angle_deg for n in values]),
        gradient_norm_ratio=_mean([n.norm_ratio for n in values]),
    )


def _kl(values: list[Numbers]) -> tuple[float, float]:
    return _mean([n.kl_added for n in values]), max(n.kl_added for n in values)


def _check_temperatures(temperatures: Seq[float]) -> None:
    outside = [t for t in temperatures if not 1 <= t <= 10]
    if outside:
        raise ValueError(f"temperature {outside[0]:g} is outside 1 … 10, the range that a store serves")


def _check_logits(name: str, logits: NDArray[Any], rows: int, vocabulary: int) -> None:
    if logits.shape != (rows, vocabulary):
        raise ValueError(f"{name} of shape {logits.shape}, expected {(rows, vocabulary)}")
    # Row by row: a mask of [P, V] would be 39 MB at 256 × 152k.
    bad = next((row for row in range(rows) if not np.isfinite(logits[row]).all()), None)
    if bad is not None:
        raise ValueError(f"{name}: row {bad} holds NaN or infinite logits")


def _check_block(block: Block, vocabulary: int) -> None:
    rows = len(block.keys)
    _check_logits("truth", block.truth, rows, vocabulary)
    signal = block.signal
    if any(part is not None and len(part) != rows for part in (signal.topk, signal.sampled, signal.hidden)):
        raise ValueError(f"a signal of {len(signal)} rows for {rows} positions of truth")
    for part in (signal.topk, signal.sampled):
        if part is not None and part.ids.max(initial=-1) >= vocabulary:
            raise ValueError(f"the signal names id {part.ids.max()}, the vocabulary ends at {vocabulary - 1}")
    if signal.topk is not None and signal.topk.kept.max(initial=0) >= vocabulary:
        raise ValueError(f"{signal.topk.kept.max()} kept ids of a vocabulary of {vocabulary}, and no tail")
    if callable(block.full_logits) and signal.hidden is None:
        raise ValueError("full_logits is to be called on hidden states, and the signal has none")
