"""Does the model keep packed sequences apart? Measured, not assumed.

Enters: the student and one real pack. Leaves: nothing, or PackingUnsafe. Costs: two forwards of a window.

Position ids that restart isolate sequences in Llama, Qwen3, Gemma 3, GPT-2, NeoX and Mixtral (transformers 5.19);
OPT, Falcon, Bloom and Mamba read across the border and say nothing. So the packed logits of a real pack are compared
with those of its sequences alone. The sequence in front has nothing to read across, so its difference is the
noise of the arithmetic; the others may differ by little more.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.pipeline.student.collate import real_tokens
from stillroom.pipeline.student.forward import NOISE, accepts_positions
from stillroom.storage.errors import PackingUnsafe
from stillroom.storage.records import Pack

REMEDY = "Set `packing: false`: one sequence per row costs padding and is always right."
#: A difference this many times that of the front sequence is more than noise.
MARGIN = 10.0


def segments_of(pack: Pack) -> list[NDArray[np.int32]]:
    """Ids of at least two sequences: the pack's own, or the two halves of its only one."""
    length = real_tokens(pack)
    ids, segment = pack.input_ids[:length], pack.segment_ids[:length]
    found = [ids[segment == number] for number in range(int(segment[-1]) + 1)]
    if len(found) > 1:
        return found
    return [ids, ids] if length < 2 else [ids[: length // 2], ids[length // 2 :]]


@torch.no_grad()
def check_packing(model: Any, pack: Pack, *, device: torch.device) -> float:
    """Largest difference in a logit between packed and alone, as a share of the largest logit.

    Raises PackingUnsafe with both numbers if it is more than noise.
    """
    name = type(model).__name__
    if not accepts_positions(model):
        raise PackingUnsafe(f"{name} takes no position ids, so packed sequences cannot be told apart. {REMEDY}")
    segments = segments_of(pack)
    was_training = model.training
    model.eval()
    packed_TV = _logits(model, np.concatenate(segments), [len(s) for s in segments], device)
    alone = [_logits(model, ids, None, device) for ids in segments]
    model.train(was_training)
    scale = max(float(a.abs().max()) for a in alone)
    parts = torch.split(packed_TV, [len(s) for s in segments])
    front, *others = (float((p - a).abs().max()) / scale for p, a in zip(parts, alone, strict=True))
    worst = max(others)
    if not worst <= max(MARGIN * front, NOISE):
        raise PackingUnsafe(
            f"{name} lets packed sequences see each other: logits differ by {worst:.1e} of the largest from the same "
            f"sequences alone, where {max(MARGIN * front, NOISE):.1e} is noise. {REMEDY}"
        )
    return worst


def _logits(model: Any, ids: NDArray[np.int32], lengths: list[int] | None, device: torch.device) -> Tensor:
    """Logits [T, V] in float32 of one row, packed if `lengths` are given."""
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None].to(device), "use_cache": False}
    if lengths is not None:
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    logits: Tensor = model(**inputs).logits[0].float()
    return logits
