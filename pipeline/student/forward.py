"""A transformers causal LM, asked for its logits at the trained positions only, or for what its head is given there.

Enters: model and `Batch`. Leaves: logits [M, V], or hidden states [M, D] and the head as a formula. Costs: the output
head runs on M of the B · T positions, often the larger part of the saving in memory (V = 151,936 in float32: 594 MiB
per 1,024 positions).

How: a pre-hook on the output head drops the other rows of its input. What models do after the head (scaling,
soft-capping) is element by element, so it goes on as the model itself does it. transformers' own `logits_to_keep`
takes other positions for each row in recent releases only (not in 5.19). That the two agree is checked at start.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from stillroom.pipeline.student.collate import Batch
from stillroom.pipeline.student.losses import StudentHead, Targets
from stillroom.storage.errors import StudentError

#: Names in a model's configuration under which logits are multiplied, divided and capped.
MULTIPLIERS = ("logit_scale",)
DIVISORS = ("logits_scaling",)
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")

#: Float32 noise between matrix products of other shapes, as a share of the largest logit.
NOISE = 1e-4


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward. Packed rows go without a mask: transformers then reads the position ids."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    return inputs


def logits_at(model: Any, batch: Batch) -> Tensor:
    """The model's logits at the M kept positions [M, V], rows in the order of `batch.targets`."""

    def keep(_head: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][batch.keep], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits: Tensor = model(**model_inputs(batch)).logits
    finally:
        hook.remove()
    return logits


def hidden_at(model: Any, batch: Batch) -> Tensor:
    """What the model's head is given at the M kept positions [M, D], rows in the order of `batch.targets`. The head
    itself runs on no position."""
    taken: list[Tensor] = []

    def take(_head: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(args[0][batch.keep])
        return (args[0].flatten(0, -2)[:0], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        model(**model_inputs(batch))
    finally:
        hook.remove()
    (hidden_MD,) = taken
    return hidden_MD


@torch.no_grad()
def student_head(model: Any, *, device: torch.device) -> StudentHead | str:
    """The model's output head as a formula that was compared with the model itself, or why there is none.

    Compared on hidden states of its own and on the same eight times as large, where a soft cap shows.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear:
        return f"its output head is a {type(layer).__name__}, not a Linear"
    batch = _probe(model).to(device)
    was_training = model.training
    model.eval()
    try:
        hidden_MD = hidden_at(model, batch)
        seen = [(hidden_MD * factor, _own_logits(model, batch, hidden_MD * factor)) for factor in (1.0, 8.0)]
    finally:
        model.train(was_training)
    forms = [
        StudentHead(layer.weight, layer.bias, scale, softcap) for softcap in _caps(model) for scale in _scales(model)
    ]
    off = [max(_distance(form.logits(hidden), own) for hidden, own in seen) for form in forms]
    best = min(range(len(forms)), key=off.__getitem__)
    if not off[best] <= NOISE:
        return f"softcap(scale · (h @ Wᵀ + b)) is off by {off[best]:.2g} of its logits' size"
    return forms[best]


def _own_logits(model: Any, batch: Batch, hidden_MD: Tensor) -> Tensor:
    """The model's own logits [M, V], its head given these hidden states."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _head, args: (hidden_MD, *args[1:]))
    try:
        logits: Tensor = model(**model_inputs(batch)).logits
    finally:
        hook.remove()
    return logits


def _distance(formula: Tensor, own: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    if formula.shape != own.shape:
        return float("inf")
    return float((formula.float() - own.float()).abs().max() / own.float().abs().max().clamp_min(1e-30))


def _scales(model: Any) -> list[float]:
    found = [1.0, *(float(value) for value in _stated(model, MULTIPLIERS))]
    return found + [1.0 / float(value) for value in _stated(model, DIVISORS)]


def _caps(model: Any) -> list[float | None]:
    return [*(float(value) for value in _stated(model, SOFT_CAPS)), None]


def _stated(model: Any, names: tuple[str, ...]) -> list[float]:
    text = model.config.get_text_config()
    return [value for name in names if (value := getattr(text, name, None))]


def accepts_positions(model: Any) -> bool:
    """Whether the model's forward takes position ids by name."""
    return "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def check_selection(model: Any, *, device: torch.device) -> None:
    """Compare `logits_at` with the model's own `.logits` on random ids. Raises StudentError if they differ, or are no
    numbers."""
    if model.get_output_embeddings() is None:
        raise StudentError(f"{type(model).__name__} names no output head (get_output_embeddings() is None)")
    batch = _probe(model).to(device)
    was_training = model.training
    model.eval()
    selected_MV = logits_at(model, batch).float()
    expected_MV = model(**model_inputs(batch)).logits[batch.keep].float()
    model.train(was_training)
    largest = float(expected_MV.abs().max())
    if not math.isfinite(largest):
        raise StudentError(
            f"{type(model).__name__}: the student gives NaN or infinite logits before its first step: its weights are "
            "damaged; name others in model.from"
        )
    if selected_MV.shape != expected_MV.shape or not torch.allclose(
        selected_MV, expected_MV, rtol=0.0, atol=NOISE * largest
    ):
        raise StudentError(
            f"{type(model).__name__}: logits taken at single positions differ from the model's own (its head is not "
            "applied position by position). This architecture cannot be trained here yet."
        )


def _probe(model: Any) -> Batch:
    """Random ids, and a few of their positions."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, model.config.vocab_size, (2, 12), generator=generator)
    keep_BT = torch.rand(2, 12, generator=generator) < 0.4
    empty = Targets(torch.zeros(0), torch.zeros(0))
    return Batch(ids_BT, keep_BT, None, torch.ones_like(ids_BT), empty)
