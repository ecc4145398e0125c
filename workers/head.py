"""The teacher's output head, taken out of the model: what turns stored hidden states into logits.

Enters: a `SlicedModel`, hidden states. Leaves: an `OutputHead` and its bytes; a calibration of the channels. Costs: a
probe of 32 positions; the bytes are V · D weights once more on the host.

    logits = softcap(scale · (h @ Wᵀ + b)),   softcap(z) = cap · tanh(z / cap), or z without a cap

The form is read from the model's configuration and then compared with what the model itself returns, on hidden states
of its own and on the same four times as large. Where it does not hold, the hidden tier is refused for that teacher:
a store whose logits are not the teacher's would be wrong for years.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stillroom.storage.calibration import HEAD_FORMAT, Calibration, head_path
from stillroom.storage.errors import TeacherError
from stillroom.storage.files import Files, sha256_hex
from stillroom.storage.records import Float32
from stillroom.workers.sliced import FEWEST_ROWS, SlicedModel

#: Names in a model's configuration under which logits are multiplied, divided and capped.
MULTIPLIERS = ("logit_scale",)
DIVISORS = ("logits_scaling",)
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")

#: Nats, see `steps_of`.
NOISE = 0.02

#: channel_scale = spread^0.8 · reach^-0.2, see `calibrate`.
SPREAD_POWER = 0.8


@dataclass(frozen=True, eq=False)
class OutputHead:
    """weight [V, D] and bias [V] or None, of the real vocabulary, on any device; scale and soft cap see above."""

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    @torch.inference_mode()
    def logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, V] in the weight's dtype, as the model computes them."""
        logits_SV = self.scale * nn.functional.linear(hidden_SD.to(self.weight.dtype), self.weight, self.bias)
        return logits_SV if self.softcap is None else self.softcap * torch.tanh(logits_SV / self.softcap)


def output_head(model: SlicedModel) -> OutputHead:
    """The model's head, as a formula that was compared with the model itself.

    Raises TeacherError where there is no such formula: the hidden tier is not available for this architecture.
    """
    layer = model.model.get_output_embeddings()
    weight = _whole(getattr(layer, "weight", None))
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise _refusal(model, "it names no output head with a weight of [V, D] in floating point")
    bias = _whole(getattr(layer, "bias", None))
    with torch.inference_mode():
        real = weight[: model.vocabulary].detach(), None if bias is None else bias[: model.vocabulary].detach()
        hidden_SD = _probe(model)
        forms = [OutputHead(*real, scale, cap) for scale in _scales(model.model) for cap in _caps(model.model)]
        off = [max(_distance(form, model, hidden_SD), _distance(form, model, 4 * hidden_SD)) for form in forms]
    best = int(np.argmin(off))
    # One rounding of the model's dtype is allowed for scaling, capping and the product each. In float32 the sums of
    # the product differ by 1e-7 of the largest logit; a missing scale, cap or bias is off by 1e-3 and more.
    allowed = max(1e-5, 2 * torch.finfo(weight.dtype).eps)
    if not off[best] <= allowed:
        raise _refusal(model, f"softcap(scale · (h @ Wᵀ + b)) is off by {off[best]:.2g} of its logits' size")
    return forms[best]


def _whole(weight: Any) -> Any:
    """Of a model that is spread over ranks, all of the weight; every rank must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def head_bytes(head: OutputHead) -> bytes:
    """The head as safetensors: `weight` [V, D], `bias` [V] where there is one; the same head gives the same bytes.

    Weights go to bfloat16 or float16 where that loses nothing. The metadata has one key, `stillroom`: JSON of `format`,
    `vocabulary`, `width`, `scale`, `softcap` (several keys would be written in any order).
    """
    tensors = {"weight": _smallest(head.weight)}
    if head.bias is not None:
        tensors["bias"] = _smallest(head.bias)
    vocabulary, width = head.weight.shape
    described = {
        "format": HEAD_FORMAT,
        "vocabulary": vocabulary,
        "width": width,
        "scale": head.scale,
        "softcap": head.softcap,
    }
    return save(tensors, metadata={"stillroom": json.dumps(described, sort_keys=True)})


def save_head(files: Files, head: OutputHead) -> str:
    """Write the head beside the shards, under its content's name; returns its path. Raises StoreFull, StoreError."""
    data = head_bytes(head)
    path = head_path(sha256_hex(data))
    files.write(path, data)
    return path


def calibrate(hidden_ND: Float32, weight_VD: Float32) -> Calibration:
    """Offset and unit of each channel for the int8 codec, from hidden states of the corpus and the output head.

    hidden_ND: float32, N ≥ 1; 2,048 positions of different documents do (4,096: the same to 0.01°).
    weight_VD: the head's, any float dtype that numpy has.

        channel_offset = mean of the channel
        channel_scale = spread^0.8 · reach^-0.2     spread: fourth root of the mean fourth power about the offset
                                                    reach: standard deviation of the channel's weights over V

    A row's largest channel sets the step of all, so scales must follow the spread (power 1 equals them all); what a
    step costs is step · reach, which alone would make it reach^-1. Angle of the student's gradient at T = 4, rebuilt
    logits without any top-k (SmolLM2-135M): 1.7° so; 2.2° with spread from the mean square and no offset and power
    0.85; 2.7° with the largest absolute value; from weights alone, norm or head, 8° and more.
    """
    if hidden_ND.ndim != 2 or not len(hidden_ND) or not np.isfinite(hidden_ND).all():
        raise ValueError(f"hidden {list(hidden_ND.shape)}, expected finite numbers [N, D] with N ≥ 1")
    offset_D = hidden_ND.mean(axis=0, dtype=np.float64)
    spread_D = ((hidden_ND - offset_D) ** 4).mean(axis=0) ** 0.25
    reach_D = weight_VD.astype(np.float32, copy=False).std(axis=0, dtype=np.float64)
    scale_D = _positive(spread_D) ** SPREAD_POWER * _positive(reach_D) ** (SPREAD_POWER - 1)
    scale_D /= np.exp(np.log(scale_D).mean())
    return Calibration(scale_D.astype(np.float32), offset_D.astype(np.float32))


def steps_of(head: OutputHead, *, noise: float = NOISE) -> Calibration:
    """Unit of each channel for the int16 codec, from the output head alone: no position of any corpus is looked at.

    noise: what rounding adds at most to a logit, in nats, as standard deviation over the vocabulary, beyond what moves
        all logits alike. The angle of the student's gradient follows from it: degrees(noise / σ) for a student whose
        logits are σ from the teacher's, at any temperature above 2 (1.15° at σ = 1); the top-k lowers it below that.

        channel_scale = noise / √(D / 12) / reach       reach: standard deviation over V of scale · weight[:, c]

    Each channel adds the same to the logits then, which at a given error takes the fewest bits (reverse water-filling;
    Cover & Thomas 2006, §10.3.3). SmolLM2-135M: 0.025 takes 521.5 bytes a position, 0.02 546.5, 0.015 580.7.
    """
    weight_VD = head.weight.detach().float().cpu().numpy()
    reach_D = abs(head.scale) * weight_VD.std(axis=0, dtype=np.float64)
    scale_D = noise / np.sqrt(weight_VD.shape[1] / 12) / _positive(reach_D)
    # In bfloat16: sums in another order on another machine give the same vector, hence the same identity.
    rounded_D = torch.from_numpy(scale_D).bfloat16().float().numpy()
    return Calibration(rounded_D, np.zeros_like(rounded_D))


def _positive(values_D: Any) -> Any:
    """Channels that never move get a thousandth of the median: a scale of zero holds nothing that comes later."""
    moving = values_D[values_D > 0]
    return np.maximum(values_D, 1e-3 * np.median(moving) if len(moving) else 1.0)


def _smallest(tensor: Tensor) -> Tensor:
    """On the CPU and contiguous, in the first 16-bit type that holds every value."""
    tensor = tensor.detach().cpu().contiguous()
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.dtype == torch.float32 and torch.equal(tensor.to(dtype).float(), tensor):
            return tensor.to(dtype)
    return tensor.clone()


def _probe(model: SlicedModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(model.vocabulary, (2, FEWEST_ROWS), generator=generator)
    return model.hidden(ids_BT, None).flatten(0, 1)


def _distance(form: OutputHead, model: SlicedModel, hidden_SD: Tensor) -> float:
    """Largest difference between form and model, as a share of the largest logit; infinite if it is none."""
    own_SV = model.logits(hidden_SD)[:, : model.vocabulary].float()
    if hidden_SD.shape[-1] != form.weight.shape[1]:
        return float("inf")
    off = float((form.logits(hidden_SD).float() - own_SV).abs().max() / own_SV.abs().max().clamp_min(1e-30))
    return off if np.isfinite(off) else float("inf")


def _scales(model: Any) -> list[float]:
    """What logits may be multiplied by: nothing, or what the configuration names."""
    named = [value for name in MULTIPLIERS if (value := _setting(model, name))]
    divisors = [value for name in DIVISORS if (value := _setting(model, name))]
    # Granite divides by logits_scaling, others of its line multiply.
    return [1.0, *named, *divisors, *(1.0 / value for value in divisors)]


def _caps(model: Any) -> list[float | None]:
    return [None, *(value for name in SOFT_CAPS if (value := _setting(model, name)))]


def _setting(model: Any, name: str) -> float | None:
    value = getattr(model.config.get_text_config(), name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _refusal(model: SlicedModel, reason: str) -> TeacherError:
    return TeacherError(
        f"teacher {model.model.name_or_path} ({type(model.model).__name__}) has no output head that can be stored: "
        f"{reason}; the hidden tier is not available for this architecture, keep `topk` instead"
    )
