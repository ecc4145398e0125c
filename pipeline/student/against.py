"""A trained student against a store's teacher: what `evaluate` says of it on that store's held-out documents. A process
of its own, as a student's device is its own.

Enters: a JSON request on stdin (folder, manifest, snapshot, device). Leaves: `Metrics` as JSON on stdout. Costs: one
load, one pass over the held-out documents.

The store may be of another teacher than the student's: so the last student of a chain is held against the first
teacher.
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
from stillroom.pipeline.student.teaching import Teaching
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream


def against(request: dict[str, Any]) -> dict[str, Any]:
    """See the module's text. Of the parts of a store the most faithful one is taken, as a student does."""
    device = choose_device(request["device"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32).to(device)
    manifest, snapshot = Manifest.open(Path(request["manifest"])), Snapshot.read(Path(request["snapshot"]))
    teaching = Teaching.of("auto", snapshot, device)
    packs = Stream(
        manifest=manifest, snapshot=snapshot, heldout=True, window=manifest.meta.window, pack=False, epochs=1,
        parts=teaching.reads,
    )  # fmt: skip
    head = student_head(model, device=device)
    found = evaluate(
        model, packs, packing=False, vocabulary=snapshot.identity.vocabulary, device=device, autocast=False,
        teaching=teaching, head=head if isinstance(head, StudentHead) else None,
    )  # fmt: skip
    return {} if found is None else found.as_dict()


if __name__ == "__main__":
    json.dump(against(json.load(sys.stdin)), sys.stdout)
