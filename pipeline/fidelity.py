"""How faithful a store is, measured on the positions that it keeps in full, and what that allows a student.

Enters: a store. Leaves: `_stillroom/fidelity.json`, which `inspect` and `ls` show, and the refusal of a student whose
loss and temperature the store does not support. Costs: reading the shards of at most 32 sequences; for a hidden part
the teacher's output head is loaded and applied to at most 256 positions. It needs no teacher.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from stillroom.pipeline.console import Console
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.config import StudentConfig, require_determined, teaching_part
from stillroom.pipeline.student.features.maps import require_held
from stillroom.storage.catalog.stores import FIDELITY, kept_fidelity
from stillroom.storage.catalog.uses import seal
from stillroom.storage.errors import CorruptShard, IdentityMismatch, UnsupportedSignal
from stillroom.storage.fidelity.bound import Bound, supports
from stillroom.storage.fidelity.gradient import Key
from stillroom.storage.fidelity.measure import TEMPERATURES, Block, Fidelity, Measured, NoiseBand, measure_blocks, noise
from stillroom.storage.fidelity.truth import FOLDER, read_positions, truth_blocks
from stillroom.storage.files import Files
from stillroom.storage.identity import Identity
from stillroom.storage.records import Float32, Signal, SignalSpec, Unit, digest128
from stillroom.storage.store import Store, open_store

Rebuild = Callable[[Signal, float], Float32]


def keep_fidelity(recipe: Recipe, store: Store, console: Console) -> None:
    """Measure a store at the usual temperatures and at those of the recipe's students, and keep the numbers in it."""
    asked = {t for student in recipe.students for t in student.temperatures(TEMPERATURES)}
    keep_measured(store, sorted({*TEMPERATURES, *asked}), console)


def keep_measured(store: Store, temperatures: Seq[float], console: Console) -> None:
    """Measure a store at these temperatures, and keep the numbers in it.

    Nothing is done if they are there for the same sample, or if the store keeps none.
    """
    found = _kept(store, console)
    sample = _sample_digest(store)
    held = {row["temperature"] for row in found["rows"]} if found and found["sample"] == sample else set()
    if set(temperatures) <= held:
        return
    # With what another recipe asked of the same store, else the two would measure it in turns.
    fidelity, band = measure_store(store, sorted({*temperatures, *held}))
    if not fidelity.rows:
        return
    stated = {"sample": sample, **fidelity.as_dict(), "noise": band.as_dict() if band else None}
    store.files.write(FIDELITY, seal(stated))
    for row in fidelity.rows:
        if row.temperature == 1:
            added = "" if row.kl_added_nats is None else f", {row.kl_added_nats:.1e} nats added by rounding"
            console.info(
                f"fidelity: {row.tier} at T = 1 keeps {row.retained_mass:.3f} of the mass, gradient "
                f"{row.gradient_angle_deg:.1f}° from full KD{added} ({row.positions} positions)"
            )


def keep_band(store: Store, band: dict[str, Any], console: Console) -> None:
    """Keep a noise band in a store that has no fidelity sample to measure one on, unless numbers are there.

    band: as `NoiseBand.as_dict` gives it.
    """
    if _kept(store, console) is None:
        stated = {"sample": _sample_digest(store), **Fidelity(()).as_dict(), "noise": band}
        store.files.write(FIDELITY, seal(stated))


def _kept(store: Store, console: Console) -> dict[str, Any] | None:
    """What was kept, or None, also where it is damaged: it can be measured again, so nobody has to remove it."""
    try:
        return kept_fidelity(store.files)
    except CorruptShard as error:
        console.notice(f"fidelity: {error}")
        return None


def require_taught(student: StudentConfig, signal: SignalSpec, *, where: str) -> None:
    """Raises UnsupportedSignal if no part of the signal can teach this student, whatever would be measured: said before
    the teacher has worked for it. where: the store, for the message."""
    for features in student.all_features():
        require_held(features, signal)
    if student.distils:
        part = teaching_part(student.losses.signal, signal)
        for losses in student.all_losses():
            require_determined(losses, part)
        for temperature in student.temperatures():
            supports(None, part, temperature, Bound(), where=where)


def require_described(recipe: Recipe, store: Store) -> None:
    """Raises IdentityMismatch if the store keeps something else than the recipe says, or of another dtype: all of the
    identity that is known where the teacher's files are not at hand."""
    held = store.identity.signal
    asked = _asked_of(recipe, held)
    parts = [("signal", held.in_words(), asked.in_words()), ("dtype", store.identity.dtype, recipe.teacher.dtype)]
    differing = [f"{name}: store {there}, asked {here}" for name, there, here in parts if there != here]
    if held != asked or differing:
        raise IdentityMismatch(
            f"store {store.uri} holds other numbers than this recipe asks for ({'; '.join(differing) or 'signal'}). "
            "Say in the recipe what the store holds, or give the recipe's signal a store.path of its own."
        )


def _asked_of(recipe: Recipe, held: SignalSpec) -> SignalSpec:
    """What the recipe asks for, of the teacher that a store's signal is of, as far as that tells."""
    width = next((part.width for part in (held.hidden, held.layers) if part), 1)
    # The blocks up to the last one that is kept; `every` chooses none behind it.
    blocks = max([0, *(held.layers.layers if held.layers else ())])
    blocks = max([blocks, *(layer + 1 for layer in (held.attention.layers if held.attention else ()))])
    return recipe.signal.spec(
        width=width,
        calibration=held.hidden.calibration if held.hidden else None,
        blocks=blocks,
        heads=(held.attention.head_count if held.attention else None) or 0,
    )


def require_supported(recipe: Recipe, student: StudentConfig, store: Store) -> None:
    """Raises UnsupportedSignal if the store does not support the student's loss within the recipe's bound, with the
    student's name, the measured number and the remedy."""
    try:
        _require_supported(recipe, student, store)
    except UnsupportedSignal as error:
        raise UnsupportedSignal(f"student {student.name}: {error}") from error


def _require_supported(recipe: Recipe, student: StudentConfig, store: Store) -> None:
    require_taught(student, store.identity.signal, where=store.uri)
    if not student.distils or recipe.fidelity.positions == 0:
        return
    # A schedule passes through all between its ends: these, and what is usually measured among them.
    temperatures = student.temperatures(TEMPERATURES)
    part = teaching_part(student.losses.signal, store.identity.signal)
    bound = Bound(recipe.fidelity.max_gradient_angle_deg, recipe.fidelity.max_kl_added)
    if bound == Bound() and "sampled" not in part:
        return
    fidelity, _ = measure_store(store, sorted({*TEMPERATURES, *temperatures}))
    for temperature in temperatures:
        supports(fidelity, part, temperature, bound, where=store.uri)


def before_and_after(source: str, destination: str, console: Console) -> list[dict[str, Any]]:
    """What transcoding made of a store's fidelity, by part and temperature; the destination's is kept in it.

    Rounding is only a part of that: ids that were cut off are no longer told apart.
    """
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    for when, uri in (("before", source), ("after", destination)):
        store = open_store(uri)
        fidelity, _ = measure_store(store, TEMPERATURES)
        for row in fidelity.rows:
            line = lines.setdefault((row.tier, row.temperature), {"part": row.tier, "temperature": row.temperature})
            line[f"mass_{when}"] = round(row.retained_mass, 4)
            line[f"gradient_angle_deg_{when}"] = round(row.gradient_angle_deg, 2)
    keep_measured(open_store(destination), TEMPERATURES, console)
    return list(lines.values())


def measure_store(store: Store, temperatures: Seq[float]) -> tuple[Fidelity, NoiseBand | None]:
    """Fidelity of every part at each temperature, and the teacher's noise band where positions were scored twice.

    Raises CorruptShard, StoreError where shards or the sample cannot be read.
    """
    refs = store.committed()
    units = [unit for unit in store.planned() if unit.id in refs]
    signals = _signals(store, units)
    rebuild = rebuilder(store.files, store.identity) if store.identity.signal.hidden and signals else None
    rows: list[Measured] = []
    for temperature in temperatures:
        blocks = _blocks(store, units, signals, rebuild, temperature)
        rows += measure_blocks(blocks, vocabulary=store.identity.vocabulary, temperatures=[temperature]).rows
    twice = (truth.twice for truth in truth_blocks(store.files, units, store.identity) if len(truth.alone))
    band = noise(twice, vocabulary=store.identity.vocabulary, temperatures=temperatures)
    fidelity = Fidelity(tuple(sorted(rows, key=lambda row: (row.tier, row.temperature))))
    return fidelity, band if band.positions else None


def _signals(store: Store, units: Seq[Unit]) -> dict[Key, Signal]:
    """What the store decodes at the sample's positions, one row each."""
    positions = read_positions(store.files, units, store.identity)
    refs = store.committed()
    found: dict[Key, Signal] = {}
    for unit in units:
        if not positions.keys() & set(unit.sequences):
            continue
        for stored in store.reader(refs[unit.id]):
            assert stored.signal is not None
            for t in positions.get(stored.sequence.digest, ()):
                row = t - stored.sequence.first_position
                found[stored.sequence.digest, t] = stored.signal[row : row + 1]
    return found


def _blocks(
    store: Store, units: Seq[Unit], signals: dict[Key, Signal], rebuild: Rebuild | None, temperature: float
) -> Iterator[Block]:
    for truth in truth_blocks(store.files, units, store.identity):
        signal = Signal.concatenate([signals[key] for key in truth.keys])
        yield Block(truth.logits, signal, truth.keys, rebuild(signal, temperature) if rebuild else None)


def rebuilder(files: Files, identity: Identity) -> Rebuild:
    """What makes the whole vocabulary's logits of a signal, as a student does: float32 [P, V]."""
    import torch

    from stillroom.pipeline.student.full_logits import Kept, full_logits, load_head

    head = load_head(files, torch.device("cpu"))
    topk = identity.signal.topk

    def rebuild(signal: Signal, temperature: float) -> Float32:
        assert signal.hidden is not None
        kept = None
        if signal.topk is not None and topk is not None:
            kept = Kept.of(signal.topk, vocabulary=identity.vocabulary, temperature=temperature, gap_step=topk.gap_step)
        rebuilt = full_logits(head, torch.from_numpy(signal.hidden), kept, temperature=temperature)
        return np.asarray(rebuilt.numpy(), np.float32)

    return rebuild


def _sample_digest(store: Store) -> str:
    """Of what was measured: the sample's files and the shards. Their names hold their contents' digests."""
    refs = store.committed()
    names = [n for n in store.files.list(FOLDER) if n.split("/")[-1].split("-")[0] in refs]
    return digest128(b"stillroom.fidelity.1", *(name.encode() for name in names))
