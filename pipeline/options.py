"""What a store of this teacher could keep, what each choice costs and how faithful it is: the planner's table.

Enters: sequences that a pilot scored with every part of the signal, and the truth at some positions. Leaves: one
`Option` per choice, measured by really writing and reading it; and the cheapest within a bound. Costs: encoding and
decoding the pilot once per choice, and the fidelity of a few dozen positions.
"""

import tempfile
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillroom.pipeline.fidelity import rebuilder
from stillroom.storage.calibration import Calibration, save_calibration
from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.codecs.topk import first_k, nucleus
from stillroom.storage.fidelity.bound import Bound
from stillroom.storage.fidelity.measure import Block, Fidelity, Measured, measure_blocks
from stillroom.storage.files import LocalFiles
from stillroom.storage.identity import Identity
from stillroom.storage.records import (
    Float32,
    HiddenSpec,
    NucleusSpec,
    SampledSpec,
    Sequence,
    Signal,
    SignalSpec,
    TopKSpec,
    Unit,
)
from stillroom.storage.shard import ShardReader, write_shard

#: Ids kept per position that are tried beside the recipe's own.
KEPT = (16, 32, 64, 128, 256)

#: Steps of a nat that are tried at the recipe's k: rounding adds as much at any other.
STEPS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)

#: Mass of a nucleus that is tried where the recipe names none.
MASS = 0.95

#: Draws that are tried where the recipe names none.
DRAWS = 50


@dataclass(frozen=True)
class Pilot:
    """What a pilot scored.

    signals: with the most ids of all options, exact, and with the draws and hidden states that options want. truth:
    float32 [n, V] by sequence digest; positions: where, in each sequence. head: what `save_head` wrote of the
    teacher's output head, as (name, bytes), and calibrations by dtype, where hidden states are priced.
    """

    identity: Identity
    sequences: list[Sequence]
    signals: list[Signal]
    truth: dict[str, Float32]
    positions: dict[str, tuple[int, ...]]
    head: tuple[str, bytes] | None
    calibrations: dict[str, Calibration]


@dataclass(frozen=True)
class Option:
    """One choice. bytes_per_token: of shards, all columns and footers. rows: of the part that would teach."""

    spec: SignalSpec
    bytes_per_token: float
    rows: tuple[Measured, ...]

    def misses(self, bound: Bound, temperatures: Seq[float]) -> list[str]:
        """What keeps this choice from serving students at these temperatures; empty if nothing does."""
        found = []
        for temperature in temperatures:
            row = next((r for r in self.rows if r.temperature == temperature), None)
            missed = bound.misses(row) if row else ["not served"]
            found += [f"at T = {temperature:g} {' and '.join(missed)}"] if missed else []
        return found


def side_bytes(pilot: Pilot) -> float:
    """Bytes a token of the layers and attention maps that the recipe keeps, written alone; 0 without them."""
    spec = side_of(pilot.identity.signal)
    if not spec.as_dict():
        return 0.0
    with tempfile.TemporaryDirectory(prefix="stillroom-plan-") as folder:
        identity = replace(pilot.identity, signal=spec)
        blocks = [Signal(layers=s.layers, attention=s.attention) for s in pilot.signals]
        unit = unit_of(pilot.sequences)
        ref = write_shard(LocalFiles(Path(folder)), identity, unit, pilot.sequences, blocks, {})
    return ref.size_bytes / sum(unit.tokens)


def side_of(spec: SignalSpec) -> SignalSpec:
    """Of what a recipe keeps, what comes beside the teacher's output, whatever is kept of that."""
    return SignalSpec(layers=spec.layers, attention=spec.attention)


def with_side(option: Option, spec: SignalSpec, size: float) -> Option:
    """The option with these layers and attention maps. size: bytes a token that they add."""
    whole = replace(option.spec, layers=spec.layers, attention=spec.attention)
    return replace(option, spec=whole, bytes_per_token=option.bytes_per_token + size)


def candidates(asked: SignalSpec, *, vocabulary: int, width: int, hidden: bool) -> list[SignalSpec]:
    """The recipe's own choice first, then the usual ones: of the teacher's output, without what comes beside it.

    hidden: whether the teacher's output head can be stored.
    """
    asked = replace(asked, layers=None, attention=None)
    step = asked.topk.gap_step if asked.topk else 1 / 8
    usual = usual_k(vocabulary)
    kept = sorted({k for k in (*KEPT, usual, asked.topk.k if asked.topk else usual) if k < vocabulary})
    plain = [SignalSpec(TopKSpec(k, step)) for k in kept]
    small = [SignalSpec(TopKSpec(k, step, layout="packed")) for k in kept]
    own = asked.topk or TopKSpec(usual, step)
    steps = [SignalSpec(TopKSpec(own.k, s)) for s in STEPS]
    fewer = SignalSpec(TopKSpec(own.k, step, own.nucleus or NucleusSpec(MASS)))
    beside = TopKSpec(usual, step)
    found = [*([asked] if asked.as_dict() else []), *plain, *small, *steps, fewer]
    found.append(SignalSpec(sampled=asked.sampled or SampledSpec(DRAWS)))
    if hidden:
        found.append(SignalSpec(hidden=HiddenSpec(width, "int16")))
        found += [SignalSpec(beside, hidden=HiddenSpec(width, dtype)) for dtype in ("int16", "int8", "bfloat16")]
    return list(dict.fromkeys(found))


def usual_k(vocabulary: int) -> int:
    """Ids kept where a recipe does not say."""
    return min(64, vocabulary - 1)


def price_all(
    pilot: Pilot, specs: Seq[SignalSpec], temperatures: Seq[float], priced: Callable[[], None] = lambda: None
) -> list[Option]:
    """Each spec's option. Packed and plain hold the same numbers, measured once. priced: called after each."""
    measured: dict[SignalSpec, tuple[Measured, ...]] = {}
    options = []
    for spec in specs:
        content = replace(spec, topk=replace(spec.topk, layout="plain")) if spec.topk else spec
        options.append(price(pilot, spec, temperatures, rows=measured.get(content)))
        measured.setdefault(content, options[-1].rows)
        priced()
    return options


def most(specs: Seq[SignalSpec], *, vocabulary: int) -> SignalSpec:
    """What a pilot must score for all of them: exact, the codecs round."""
    kept = max((s.topk.k for s in specs if s.topk), default=usual_k(vocabulary))
    sampled = next((s.sampled for s in specs if s.sampled), None)
    hidden = next((s.hidden for s in specs if s.hidden), None)
    return SignalSpec(TopKSpec(kept, None), sampled, HiddenSpec(hidden.width, "bfloat16") if hidden else None)


def price(
    pilot: Pilot, spec: SignalSpec, temperatures: Seq[float], *, rows: tuple[Measured, ...] | None = None
) -> Option:
    """Write the pilot as this spec says, read it back, and hold it against the truth.

    rows: what was measured of the same numbers in another layout; then it is only written.
    """
    with tempfile.TemporaryDirectory(prefix="stillroom-plan-") as folder:
        files = LocalFiles(Path(folder))
        if spec.hidden:
            assert pilot.head is not None
            files.write(*pilot.head)
            steps = pilot.calibrations.get(spec.hidden.dtype)
            calibration = save_calibration(files, steps) if steps else None
            spec = SignalSpec(spec.topk, spec.sampled, HiddenSpec(spec.hidden.width, spec.hidden.dtype, calibration))
        identity = Identity(**{**vars(pilot.identity), "signal": spec})
        blocks = [cut(signal, spec, pilot.identity.vocabulary) for signal in pilot.signals]
        ref = write_shard(files, identity, unit_of(pilot.sequences), pilot.sequences, blocks, {})
        if rows is None:
            rows = _fidelity(pilot, ShardReader(files, ref, identity), files, identity, temperatures).rows
    tier = next(part for part in ("hidden", "topk", "sampled") if getattr(spec, part))
    tokens = sum(len(s.input_ids) for s in pilot.sequences)
    return Option(spec, ref.size_bytes / tokens, tuple(row for row in rows if row.tier == tier))


def unit_of(sequences: Seq[Sequence]) -> Unit:
    """The unit that these make, in this order."""
    return Unit(
        tuple(s.digest for s in sequences),
        tuple(len(s.input_ids) for s in sequences),
        tuple(s.context for s in sequences),
    )


def cut(signal: Signal, spec: SignalSpec, vocabulary: int) -> Signal:
    """Of all that was scored, what a spec keeps; rounding is the codec's."""
    topk = None
    if spec.topk:
        assert signal.topk is not None
        topk = first_k(signal.topk, spec.topk.k)
        if spec.topk.nucleus:
            mass, temperature = spec.topk.nucleus.mass, spec.topk.nucleus.temperature
            tail = tail_lse_at(topk.tail_lse, 1 / temperature, vocabulary - spec.topk.k)
            topk = nucleus(topk, mass, temperature, tail)
    return Signal(topk, signal.sampled if spec.sampled else None, signal.hidden if spec.hidden else None)


def cheapest(options: Seq[Option], bound: Bound, temperatures: Seq[float]) -> Option | None:
    """The smallest choice that serves students at these temperatures within the bound."""
    fit = [option for option in options if not option.misses(bound, temperatures)]
    return min(fit, key=lambda option: option.bytes_per_token, default=None)


def coarsest(options: Seq[Option], k: int, bound: Bound, temperatures: Seq[float]) -> Option | None:
    """Of what keeps the top k and nothing else, the one with the largest step that adds no more than the bound's KL;
    None where every step adds more, or there is no such bound. Angles follow from k, and are not asked."""
    most = bound.max_kl_added
    if most is None:
        return None
    found = []
    for option in options:
        topk = option.spec.topk
        if topk is None or option.spec != SignalSpec(TopKSpec(k, topk.gap_step)) or topk.gap_step is None:
            continue
        added = [row.kl_added_nats for row in option.rows if row.temperature in temperatures]
        if all(kl is not None and kl <= most for kl in added):
            found.append((topk.gap_step, option))
    return max(found, key=lambda each: each[0])[1] if found else None


def step_of(option: Option) -> float:
    """Of a choice of `coarsest`."""
    assert option.spec.topk is not None
    assert option.spec.topk.gap_step is not None
    return option.spec.topk.gap_step


def stepped(spec: SignalSpec, step: float) -> list[SignalSpec]:
    """The spec with its gaps in steps at least as large, plain and packed; none where it has no gaps."""
    if spec.topk is None:
        return []
    coarser = replace(spec.topk, gap_step=max(step, spec.topk.gap_step or 0.0))
    return [replace(spec, topk=replace(coarser, layout="plain")), replace(spec, topk=replace(coarser, layout="packed"))]


def _fidelity(
    pilot: Pilot, reader: ShardReader, files: LocalFiles, identity: Identity, temperatures: Seq[float]
) -> Fidelity:
    rebuild = rebuilder(files, identity) if identity.signal.hidden else None
    held: list[tuple[list[Any], Signal]] = []
    for stored in reader:
        positions = pilot.positions.get(stored.sequence.digest, ())
        if positions:
            assert stored.signal is not None
            rows = [t - stored.sequence.first_position for t in positions]
            parts = [stored.signal[row : row + 1] for row in rows]
            held.append(([(stored.sequence.digest, t) for t in positions], Signal.concatenate(parts)))
    measured: list[Measured] = []
    for temperature in temperatures:
        blocks = [
            Block(pilot.truth[keys[0][0]], signal, keys, rebuild(signal, temperature) if rebuild else None)
            for keys, signal in held
        ]
        measured += measure_blocks(blocks, vocabulary=identity.vocabulary, temperatures=[temperature]).rows
    return Fidelity(tuple(measured))


def brief(lines: Seq[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's lines for people: one per choice, its temperatures side by side."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = found.setdefault(
            line["keeps"],
            {"keeps": line["keeps"], "bytes_per_token": line["bytes_per_token"], "corpus_bytes": line["corpus_bytes"]},
        )
        mass, kl, angle = line["retained_mass"], line["kl_added"], line["gradient_angle_deg"]
        at = f"T = {line['temperature']:g}"
        if "mass, kl" not in row:
            row["mass, kl"] = f"{mass:.3f}, " + ("–" if kl is None else f"{kl:.0e}")
        row[f"angle at {at}"] = f"{angle:.1f}°"
    return list(found.values())
