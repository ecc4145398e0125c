"""Measure one model folder: parameters, memory, latency, and quality on the held-out text. A process of its own, so
that teacher and student never share a device, and each one's memory is its own.

Enters: a JSON request on stdin (folder, dtype, device, manifest_path, latency_tokens, trust_remote_code, and for a
student that is to answer prompts `answers`). Leaves: a JSON object on stdout. Costs: one load, one pass over the
held-out documents, `latency_tokens` greedy steps three times, the answers.
"""

import json
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.answering import greedy_answers
from stillroom.pipeline.student.evaluate import evaluate, generated_sequences
from stillroom.pipeline.student.model import load_tokenizer
from stillroom.storage.manifest import Manifest
from stillroom.storage.stream import Stream

#: Tokens of the prompt before latency is measured.
PROMPT_TOKENS = 32


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """See the module's text. latency_ms_per_token: median of three greedy continuations with a cache, batch of one."""
    device = request["device"] if request["device"] != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"], dtype=dtype, trust_remote_code=request["trust_remote_code"]
    )
    model = model.to(device).eval()
    manifest = Manifest.open(Path(request["manifest_path"]))
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        **_quality(model, manifest),
        "latency_ms_per_token": _latency_ms(model, manifest, int(request["latency_tokens"])),
        "peak_memory_bytes": _peak_memory_bytes(device),
        "device": device,
        "dtype": request["dtype"],
    }
    if request.get("answers"):
        found["answers"] = _answers(model, request)
    return found


def _answers(model: Any, request: dict[str, Any]) -> list[dict[str, Any] | None]:
    asked = request["answers"]
    tokenizer = load_tokenizer(request["folder"])
    given = greedy_answers(model, tokenizer, asked["prompts"], max_tokens=asked["max_tokens"], stop=asked["stop"])
    return [None if answer is None else answer.as_dict() for answer in given]


def _quality(model: Any, manifest: Manifest) -> dict[str, Any]:
    """Perplexity and expected calibration error on the held-out documents, or nulls where there are none."""
    found = None
    if manifest.index().heldout.any():
        window, vocabulary = manifest.meta.window, manifest.meta.vocabulary
        packs = Stream(manifest=manifest, snapshot=None, heldout=True, window=window, pack=False, epochs=1)
        found = evaluate(
            model, packs, packing=False, vocabulary=vocabulary, device=torch.device(model.device), autocast=False,
            generated=generated_sequences(manifest),
        )  # fmt: skip
    if found is None:
        return {"perplexity": None, "ece": None, "heldout_positions": 0}
    kinds = (found.perplexity_teacher_text, found.perplexity_ground_truth)
    of_kind = dict(zip(("perplexity_teacher_text", "perplexity_ground_truth"), kinds, strict=True))
    return {
        "perplexity": found.perplexity,
        "ece": found.ece,
        "heldout_positions": found.tokens,
        **{key: value for key, value in of_kind.items() if value is not None},
    }


@torch.inference_mode()
def _latency_ms(model: Any, manifest: Manifest, tokens: int) -> float:
    ids = manifest.rows([0])[0].sequence.input_ids[:PROMPT_TOKENS]
    prompt = torch.tensor(ids, dtype=torch.long, device=model.device)[None]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        tokens = max(1, min(tokens, limit - prompt.shape[1]))
    times = []
    for _ in range(3):
        out = model(prompt, use_cache=True)
        start = time.perf_counter()
        for _ in range(tokens):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / tokens * 1000)
    return median(times)


def _peak_memory_bytes(device: str) -> int:
    """Of the device, or of the process where the device is the CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    json.dump(measure(json.load(sys.stdin)), sys.stdout)
