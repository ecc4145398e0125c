"""A transformers causal LM, asked for its logits at the trained positions only.

Enters: model and `Batch`. Leaves: logits [M, V]. Costs: the output head runs on M of the B · T positions, often the
larger part of the saving in memory (V = 151,936 in float32: 594 MiB per 1,024 positions).

How: a pre-hook on the output head drops the other rows of its input. What models do after the head (scaling,
soft-capping) is element by element, so it goes on as the model itself does it. transformers' own `logits_to_keep`
takes other positions for each row in recent releases only (not in 5.19). That the two agree is checked at start.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from stillroom.pipeline.student.collate import Batch
from stillroom.pipeline.student.losses import Targets
from stillroom.storage.errors import StudentError

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


def accepts_positions(model: Any) -> bool:
    """Whether the model's forward takes position ids by name."""
    return "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def check_selection(model: Any, *, device: torch.device) -> None:
    """Compare `logits_at` with the model's own `.logits` on random ids. Raises StudentError if they differ."""
    if model.get_output_embeddings() is None:
        raise StudentError(f"{type(model).__name__} names no output head (get_output_embeddings() is None)")
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, model.config.vocab_size, (2, 12), generator=generator)
    keep_BT = torch.rand(2, 12, generator=generator) < 0.4
    empty = Targets(torch.zeros(0), torch.zeros(0))
    batch = Batch(ids_BT, keep_BT, None, torch.ones_like(ids_BT), empty).to(device)
    was_training = model.training
    model.eval()
    selected_MV = logits_at(model, batch).float()
    expected_MV = model(**model_inputs(batch)).logits[batch.keep].float()
    model.train(was_training)
    largest = float(expected_MV.abs().max())
    if selected_MV.shape != expected_MV.shape or not torch.allclose(
        selected_MV, expected_MV, rtol=0.0, atol=NOISE * largest
    ):
        raise StudentError(
            f"{type(model).__name__}: logits taken at single positions differ from the model's own (its head is not "
            "applied position by position). This architecture cannot be trained here yet."
        )
