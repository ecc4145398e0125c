"""A trained student on held-out documents of stores: what `evaluate` says of it there. A process of its own, as a
student's device is its own.

Enters: a JSON request on stdin: folder, device, and `on`, a list of what it is held against, each with a manifest and a
snapshot (null: the text alone). Leaves: a list of `Metrics` as JSON on stdout, {} where nothing is held out. Costs: one
load, and for each of `on` one pass over all of its held-out documents, in float32.

A store may be of another teacher than the student's: so the last student of a chain is held against the first teacher.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.device import choose_device
from stillroom.pipeline.student.evaluate import evaluate
from stillroom.pipeline.student.forward import student_head
from stillroom.pipeline.student.losses import StudentHead
from stillroom.pipeline.student.streams import has_output
from stillroom.pipeline.student.teaching import TOPK, Teaching
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream


def against(request: dict[str, Any]) -> list[dict[str, Any]]:
    """See the module's text."""
    device = choose_device(request["device"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32).to(device)
    return [
        _measured(model, Manifest.open(Path(on["manifest"])), on["snapshot"] and Path(on["snapshot"]), device)
        for on in request["on"]
    ]


def _measured(model: Any, manifest: Manifest, path: Path | None, device: torch.device) -> dict[str, Any]:
    """Of the parts of a store the most faithful one is taken, as a student does; where none is the output's, the text
    alone measures."""
    if not manifest.index().heldout.any():
        return {}
    snapshot = Snapshot.read(path) if path else None
    if snapshot and not has_output(snapshot.identity.signal):
        snapshot = None
    teaching = Teaching.of("auto", snapshot, device) if snapshot else TOPK
    packs = Stream(
        manifest=manifest, snapshot=snapshot, heldout=True, window=manifest.meta.window, pack=False, epochs=1,
        parts=teaching.reads,
    )  # fmt: skip
    vocabulary = snapshot.identity.vocabulary if snapshot else manifest.meta.vocabulary
    head = student_head(model, device=device)
    found = evaluate(
        model, packs, packing=False, vocabulary=vocabulary, device=device, autocast=False, teaching=teaching,
        head=head if isinstance(head, StudentHead) else None,
    )  # fmt: skip
    return {} if found is None else found.as_dict()


if __name__ == "__main__":
    json.dump(against(json.load(sys.stdin)), sys.stdout)
