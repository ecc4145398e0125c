"""Does the teacher still say what the store holds? `stillroom verify STORE --rescore N`.

Enters: a store, and how many of its units to score again. Leaves: how far the two scorings are apart, and which units
are outside the noise band. Costs: the teacher's memory, and its time for those units; one unit at a time.

It finds what no digest can: shards that were scored by something else than what the identity says, by a faulty device,
or by a library that computed something else.
"""

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stillroom.storage.care.difference import Band, Difference, band_of, difference
from stillroom.storage.errors import CorruptShard, IdentityMismatch
from stillroom.storage.fidelity.measure import noise
from stillroom.storage.fidelity.truth import truth_blocks
from stillroom.storage.identity import Identity
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Sequence, ShardRef, Signal, digest128
from stillroom.storage.shard import signal_codec
from stillroom.storage.store import Store, open_store
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher

ProgressCall = Callable[[int, int], None]

#: Implementations of attention that run wherever torch does; a store scored with another is scored with the default.
_ATTENTION = ("sdpa", "eager")


def rescore_store(
    uri: str,
    units: int,
    *,
    teacher: str | None = None,
    seed: int = 0,
    skip: Collection[str] = (),
    drop: bool = False,
    device: str = "auto",
    progress: ProgressCall | None = None,
) -> dict[str, Any]:
    """Score a sample of the committed units again, and compare.

    units: how many; all if there are fewer. teacher: where the teacher is now; None takes the name that the identity
    has. seed: of the choice. skip: paths of shards not to be chosen, as they are known to be broken. drop: take those
    outside the band out of the log, so that `stillroom teach` scores them again. progress: called with (units done, in
    all).

    Returns a dictionary with `problems`, a list of {shard, problem, remedy}, and under `rescored` the numbers. Raises
    IdentityMismatch if the teacher is not the one of the store, TeacherError if there is none, StoreError.
    """
    store = open_store(uri)
    refs = _chosen(store, units, seed, skip)
    if not refs:
        return {"rescored": {"units": 0}, "problems": []}
    scorer = _load(store, refs[0], teacher, device)
    band = band_of(store.identity.dtype, store.identity.signal, _measured(store))
    found: list[_Rescored] = []
    for number, ref in enumerate(refs, start=1):
        found.append(_rescore(store, ref, scorer))
        if progress:
            progress(number, len(refs))
    scorer.release()
    outside = [unit for unit in found if band.misses(unit.difference)]
    dropped = CommitLog.open(store.uri).remove([unit.ref for unit in outside]) if drop else []
    return {
        "rescored": _summary(found, band, scorer) | {"units_dropped": sorted(ref.unit for ref in dropped)},
        "problems": [_problem(unit, band) | ({"repaired": True} if drop else {}) for unit in outside],
    }


@dataclass(frozen=True)
class _Rescored:
    """differs: what of the provenance is not as it was, in words."""

    ref: ShardRef
    difference: Difference
    differs: tuple[str, ...]


def _chosen(store: Store, units: int, seed: int, skip: Collection[str]) -> list[ShardRef]:
    """The `units` of smallest hash: the same for the same store and seed; fewer of them are the first of more."""
    refs = [ref for ref in store.committed().values() if ref.path not in skip]
    by_hash = {digest128(b"stillroom.rescore.1", str(seed).encode(), ref.unit.encode()): ref for ref in refs}
    return [ref for _, ref in sorted(by_hash.items())[:units]]


def _load(store: Store, ref: ShardRef, teacher: str | None, device: str) -> TorchTeacher:
    """The store's teacher, run as the shard says that it was run."""
    from stillroom.workers.digests import QUANTISED, identity_parts
    from stillroom.workers.source import cache_folder, load_tokenizer, resolve_model

    identity = store.identity
    folder = resolve_model(teacher or identity.teacher)
    text = load_tokenizer(folder).backend_tokenizer.to_str()
    # Weights that the folder holds quantised have another name there, and are loaded as they lie.
    quantisation: Any = {name: kind for kind, name in QUANTISED.items()}.get(identity.quantisation or "")
    parts = identity_parts(folder, text, dtype=identity.dtype, quantisation=quantisation, cache_dir=cache_folder())
    _require_same(store, Identity(teacher=identity.teacher, signal=identity.signal, format=identity.format, **parts))
    provenance = _provenance(store.reader(ref).footer)
    return TorchTeacher(
        TeacherSpec(
            folder=folder,
            dtype=identity.dtype,  # type: ignore[arg-type]  # one of its three, or transformers would not have loaded it
            quantisation=quantisation,
            device=device,
            attention=provenance.get("attention") if provenance.get("attention") in _ATTENTION else None,
            slice_positions=provenance.get("slice_positions"),
        )
    )


def _require_same(store: Store, found: Identity) -> None:
    """Raises IdentityMismatch naming each part in which the teacher at hand is another than the store's."""
    mine, theirs = store.identity.parts(), found.parts()
    differing = [f"{key}: store {mine[key]}, teacher {theirs[key]}" for key in mine if mine[key] != theirs[key]]
    if differing:
        raise IdentityMismatch(
            f"the teacher at hand is not the one of store {store.uri} ({'; '.join(differing)}): name the right one "
            "with --teacher"
        )


def _measured(store: Store) -> tuple[float, float] | None:
    """Mean and worst KL of the fidelity sample's two scorings; None where nothing was scored twice."""
    refs = store.committed()
    blocks = truth_blocks(store.files, [u for u in store.planned() if u.id in refs], store.identity)
    try:
        twice = (block.twice for block in blocks if len(block.alone_rows))
        band = noise(twice, vocabulary=store.identity.vocabulary, temperatures=(1.0,))
    except CorruptShard:  # verify says so; the usual band is the narrower one
        return None
    return (band.rows[0].kl_nats, band.rows[0].kl_worst_nats) if band.rows else None


def _rescore(store: Store, ref: ShardRef, teacher: TorchTeacher) -> _Rescored:
    reader = store.reader(ref)
    stored = list(reader)
    sequences = [s.sequence for s in stored]
    provenance = _provenance(reader.footer)
    if "batch_shapes" in provenance:
        teacher.spec = replace(teacher.spec, batch_tokens=batch_tokens_of(provenance["batch_shapes"]))
    again = Signal.concatenate(teacher.score(sequences, signal=store.identity.signal))
    held = Signal.concatenate([s.signal for s in stored if s.signal is not None])
    differs = _differing(provenance, teacher.provenance(sequences))
    return _Rescored(ref, difference(held, _rounded(store, sequences, again)), tuple(differs))


def _provenance(footer: dict[str, Any]) -> dict[str, Any]:
    """How the unit was scored; of a transcoded shard, how its first source was."""
    found = footer.get("provenance", {})
    source = found.get("source", found)
    return dict(source[0] if isinstance(source, list) and source else source)


def _differing(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What may move numbers within the noise band. Threads do not."""
    for key in sorted(now.keys() - {"threads"}):
        if was.get(key) != now[key]:
            yield "batch shapes" if key == "batch_shapes" else f"{key} (was {was.get(key)}, is {now[key]})"


def batch_tokens_of(shapes: Seq[Seq[int]]) -> int:
    """A budget under which `batching.batches` makes these shapes again: (sequences, padded tokens) of each batch.

    The smallest one that lets every batch be as full as it was. What did not fit the true budget, which is no smaller,
    does not fit this one.
    """
    return max((int(count) * int(longest) for count, longest in shapes if count > 1), default=1)


def _rounded(store: Store, sequences: Seq[Sequence], signal: Signal) -> Signal:
    """As a reader would have it."""
    codec = signal_codec(store.files, store.identity)
    rows = np.array([s.rows for s in sequences], np.int64)
    columns = dict(zip((field.name for field in codec.fields()), codec.encode(signal, rows), strict=True))
    return codec.decode(columns, rows)


def _summary(found: Seq[_Rescored], band: Band, teacher: TorchTeacher) -> dict[str, Any]:
    return {
        "units": len(found),
        "positions": sum(unit.difference.positions for unit in found),
        "bit_equal_units": sum(unit.difference.bit_equal for unit in found),
        "teacher": str(teacher.spec.folder),
        "differs": sorted({text for unit in found for text in unit.differs}),
        "band": band.as_dict(),
        "by_unit": [{"unit": unit.ref.unit, **unit.difference.as_dict()} for unit in found],
    }


def _problem(unit: _Rescored, band: Band) -> dict[str, Any]:
    elsewhere = f"; scored now with other {', '.join(unit.differs)}" if unit.differs else ""
    return {
        "shard": unit.ref.path,
        "problem": f"the teacher says something else now, outside the noise band ({band.source}): "
        f"{'; '.join(band.misses(unit.difference))}{elsewhere}",
        "remedy": "where it is so for all units, the store is not of this teacher: teach into another store.path; "
        "where for few, `--rescore N --repair` drops them from the log, and `stillroom teach` scores them again",
    }
