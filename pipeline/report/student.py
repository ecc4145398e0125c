"""A student's rows on the text that the page shows; run as a process of its own, so that models are loaded one at a
time and let go.

Enters: a JSON request on stdin (folder of the export, device, trust_remote_code, vocabulary, request: an .npz of
windows, answer: where to write). Leaves: the .npz `answer`: ids int32 [R, TOP], probabilities float32 [R, TOP], kl
float32 [R] in nats. Costs: one load, one forward of each window.

KL is that of `evaluate`: over the teacher's kept ids and one bucket for the rest, a lower bound of that of the whole
vocabulary; NaN where the store has draws alone.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from stillroom.pipeline.report.teacher import TOP
from stillroom.pipeline.student.losses import bucket_kl
from stillroom.storage.files import LocalFiles


@torch.inference_mode()
def predict(request: dict[str, Any]) -> None:
    """See the module's text."""
    torch.set_grad_enabled(False)
    device = request["device"] if request["device"] != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"], dtype=torch.float32, trust_remote_code=request["trust_remote_code"]
    )
    model = model.to(device).eval()
    with np.load(request["request"]) as given:
        ids, lengths, starts, stops = (given[name] for name in ("ids", "lengths", "starts", "stops"))
        kept, logits, tail = (torch.from_numpy(given[name]) for name in ("kept", "logits", "tail_lse"))
    found: dict[str, list[torch.Tensor]] = {"ids": [], "probabilities": [], "kl": []}
    at = row = 0
    for length, start, stop in zip(lengths.tolist(), starts.tolist(), stops.tolist(), strict=True):
        window = torch.from_numpy(ids[at : at + length].astype(np.int64)).to(device)
        logits_RV = model(window[None]).logits[0, start:stop, : request["vocabulary"]].float().cpu()
        part = slice(row, row + stop - start)
        top = logits_RV.softmax(-1).topk(min(TOP, logits_RV.shape[1]))
        found["ids"].append(top.indices.int())
        found["probabilities"].append(top.values)
        found["kl"].append(
            bucket_kl(logits_RV, kept[part].long(), logits[part], tail[part], temperature=1.0)
            if request["has_kl"]
            else torch.full((stop - start,), torch.nan)
        )
        at, row = at + length, part.stop
    sink = io.BytesIO()
    np.savez(sink, **{name: torch.cat(parts).numpy() for name, parts in found.items()})  # type: ignore[arg-type]
    path = Path(request["answer"])
    LocalFiles(path.parent).write(path.name, sink.getvalue())


if __name__ == "__main__":
    predict(json.load(sys.stdin))
