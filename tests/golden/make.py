"""Made the stores beside this file: `python -m tests.golden.make`, for a new format version or a new kind of signal.

It adds what is not there. A store that is there is never made anew, of whatever version: that today's code reads it,
bit for bit, is its use.
What they hold is written out in `expected.json`, numbers as hexadecimal floats: the manifest's digest, and under its
name what a reader sees of each store. v1 is of format 1, v2 of format 2, v3 of format 3, which stores with layers or
attention maps have. v2 has a student's snapshot of one of its stores beside them, `snapshot.parquet`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.calibration import Calibration, save_calibration
from stillroom.storage.catalog.views import TokenRow, texts_of, write_token_table
from stillroom.storage.fidelity.truth import Truth, truth_blocks, write_truth
from stillroom.storage.files import Files, open_files
from stillroom.storage.identity import FORMAT_VERSION, LAYERS_FORMAT
from stillroom.storage.records import (
    AttentionSpec,
    HiddenSpec,
    LayersSpec,
    NucleusSpec,
    SampledSpec,
    Sequence,
    Signal,
    SignalSpec,
    TopKSpec,
)
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store, open_store
from tests.strategies import digest_teacher, manifest_row, tiny_identity, tiny_manifest, tiny_store, unit_of

HERE = Path(__file__).parent

#: Digest of `golden_calibration`'s file, which the identities of quantised hidden states hold.
CALIBRATION = "c15700271c65f60bc57044e61995ce8f124e0995c61079e2313121dd0c1783ad"

#: What the stores keep, by their folders' names. Of format 1: int16 and float32.
SIGNALS = {
    "int16": SignalSpec(TopKSpec(4, 1 / 8)),
    "float32": SignalSpec(TopKSpec(4, None)),
    "nucleus": SignalSpec(TopKSpec(6, 1 / 16, NucleusSpec(0.9, 2.0))),
    "sampled": SignalSpec(sampled=SampledSpec(20)),
    "hidden": SignalSpec(hidden=HiddenSpec(8, "bfloat16")),
    "all": SignalSpec(TopKSpec(4, 1 / 8), SampledSpec(20), HiddenSpec(8, "bfloat16")),
    "packed": SignalSpec(TopKSpec(4, 1 / 8, layout="packed")),
    "packed nucleus": SignalSpec(TopKSpec(6, 1 / 16, NucleusSpec(0.9, 2.0), layout="packed")),
    "hidden int8": SignalSpec(hidden=HiddenSpec(8, "int8", CALIBRATION)),
    "hidden int16": SignalSpec(hidden=HiddenSpec(8, "int16", CALIBRATION)),
    "side files": SignalSpec(TopKSpec(4, 1 / 8)),
    "layers": SignalSpec(layers=LayersSpec((0, 2), 8, "bfloat16")),
    "layers float32": SignalSpec(layers=LayersSpec((1,), 8, "float32")),
    "maps": SignalSpec(attention=AttentionSpec((0, 1), 16)),
    "maps of heads": SignalSpec(attention=AttentionSpec((1,), 16, "per_head", 2, "float32")),
    "every part": SignalSpec(
        TopKSpec(4, 1 / 8), SampledSpec(20), HiddenSpec(8, "bfloat16"), LayersSpec((0, 2), 8, "bfloat16"),
        AttentionSpec((1,), 16),
    ),
    "every part otherwise": SignalSpec(
        TopKSpec(6, 1 / 16, NucleusSpec(0.9, 2.0), layout="packed"), SampledSpec(20),
        HiddenSpec(8, "int8", CALIBRATION), LayersSpec((1,), 8, "float32"),
        AttentionSpec((1,), 16, "per_head", 2, "float32"),
    ),
}  # fmt: skip

#: The store with a fidelity sample and a token table.
WITH_SIDE_FILES = "side files"
#: The store that the snapshot pins.
PINNED = "int16"


def of_version(version: int) -> set[str]:
    """The names of the stores that a format is written for; 1 had two of those of 2."""
    late = {name for name, signal in SIGNALS.items() if signal.layers or signal.attention}
    return {1: {"int16", "float32"}, 2: SIGNALS.keys() - late, 3: late}[version]


def golden_sequences() -> list[Sequence]:
    """Lengths 1 to 9, with and without a context; ids from a formula, so that no random generator is needed."""
    return [
        Sequence(((np.arange(length) * 7 + length) % 40).astype(np.int32), context)
        for length, context in ((9, 0), (1, 0), (6, 2), (4, 1), (8, 7))
    ]


def golden_calibration(files: Files) -> None:
    """Vectors by a formula. A pyarrow that writes other bytes asks for a copy of what lies in v2."""
    channels = np.arange(8, dtype=np.float32)
    scale, offset = (channels + 1) / 1000, channels / 8 - 0.5
    found = save_calibration(files, Calibration(scale.astype(np.float32), offset.astype(np.float32)))
    assert found == CALIBRATION, f"{found} was written: copy the file from a store of v2"


def golden_side_files(store: Store) -> None:
    """The whole vocabulary at two positions of the first unit, one of them scored twice; texts of ids."""
    unit, first = unit_of(golden_sequences()[:3]), golden_sequences()[0]
    logits_RV = digest_teacher(first, store.identity.vocabulary)[2:4].astype(np.float32)
    positions = np.array([2, 3], np.int32)
    truth = Truth((first.digest,) * 2, positions, logits_RV, logits_RV[1:] + 0.25, np.array([1]))
    write_truth(store.files, unit, truth, store.identity)
    words = [("Ġthe", " the"), ("▁a", "a"), ("Ċ", "\n"), ("Ã", "\ufffd"), (None, "")]
    write_token_table(store.files, (TokenRow(number, *words[number % len(words)]) for number in range(40)))


def contents(store: Store) -> dict[str, Any]:
    """All that a reader sees, as JSON that loses no bit."""
    return {
        "identity": store.identity.id,
        "plan": [[u.id, list(u.sequences), list(u.tokens), list(u.contexts)] for u in store.planned()],
        "shards": {unit: ref.path for unit, ref in sorted(store.committed().items())},
        "sequences": [
            {
                "digest": s.sequence.digest,
                "context": s.sequence.context,
                "input_ids": s.sequence.input_ids.tolist(),
                **signal_contents(s.signal),
            }
            for s in store.sequences()
            if s.signal is not None
        ],
        **side_contents(store),
    }


def side_contents(store: Store) -> dict[str, Any]:
    """Fidelity sample and texts of ids, where there are any."""
    blocks = list(truth_blocks(store.files, store.planned(), store.identity))
    texts = texts_of(store.files)
    truth = [
        {"keys": [list(key) for key in b.keys], "logits": _hex(b.logits), "alone": _hex(b.alone),
         "alone_rows": b.alone_rows.tolist()}
        for b in blocks
    ]  # fmt: skip
    return ({"truth": truth} if truth else {}) | ({} if texts is None else {"texts": texts})


def snapshot_contents(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "uri": snapshot.uri,
        "digest": snapshot.digest,
        "identity": snapshot.identity.id,
        "units": [[u.id, list(u.sequences), list(u.tokens), list(u.contexts)] for u in snapshot.units],
        "shards": {unit: [ref.path, ref.sha256, ref.size_bytes] for unit, ref in sorted(snapshot.refs.items())},
    }


def signal_contents(signal: Signal) -> dict[str, Any]:
    """What is there of the parts; a nucleus without the slots that it does not use."""
    said: dict[str, Any] = {}
    if signal.topk:
        kept, ids = signal.topk.kept.tolist(), signal.topk.ids.tolist()
        said["topk_ids"] = [row[:n] for row, n in zip(ids, kept, strict=True)]
        said["logits"] = [row[:n] for row, n in zip(_hex(signal.topk.logits), kept, strict=True)]
        said["tail_lse"] = _hex(signal.topk.tail_lse)
    if signal.sampled:
        drawn = (signal.sampled.counts > 0).sum(axis=1).tolist()
        for name, part in (("sampled_ids", signal.sampled.ids), ("sampled_counts", signal.sampled.counts)):
            said[name] = [row[:n] for row, n in zip(part.tolist(), drawn, strict=True)]
    if signal.hidden is not None:
        said["hidden"] = _hex(signal.hidden)
    if signal.layers is not None:
        said["layers"] = [_hex(row) for row in signal.layers]
    if signal.attention is not None:
        said["attention"] = _hex(signal.attention.values)
    return said


def _hex(array: NDArray[np.float32]) -> list[list[str]]:
    return [[float(x).hex() for x in row] for row in array]


def make(version: int) -> None:
    folder = HERE / f"v{version}"
    sequences, path = golden_sequences(), folder / "expected.json"
    expected: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    folder.mkdir(exist_ok=True)
    for name in sorted(of_version(version) - expected.keys()):
        signal = SIGNALS[name]
        if signal.hidden and signal.hidden.calibration:
            golden_calibration(open_files(str(folder / name)))
        store = tiny_store(folder / name, sequences, identity=tiny_identity(signal=signal), per_unit=3)
        if name == WITH_SIDE_FILES:
            golden_side_files(store)
        first = folder / name / "_delta_log" / f"{0:020}.json"  # the one entry that says where the table was made
        first.write_text(first.read_text().replace(HERE.as_uri(), "file:///golden"))
        expected[name] = contents(open_store(str(folder / name)))
    if "manifest" not in expected:
        rows = [manifest_row(s, weight=n / 2, document=n, heldout=n == 3) for n, s in enumerate(sequences)]
        expected["manifest"] = tiny_manifest(folder / "manifest.parquet", rows).digest
    if PINNED in of_version(version) and "snapshot" not in expected:
        snapshot = replace(open_store(str(folder / PINNED)).snapshot(), uri=PINNED)  # no path of this machine
        snapshot.write(folder / "snapshot.parquet")
        expected["snapshot"] = snapshot_contents(snapshot)
    path.write_text(json.dumps(expected, sort_keys=True) + "\n")


if __name__ == "__main__":
    for version in (FORMAT_VERSION, LAYERS_FORMAT):
        make(version)
