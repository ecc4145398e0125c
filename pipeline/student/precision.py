"""In which numbers a student's forward and backward run, and the scale that float16 needs.

Enters: `precision` of a student, the device. Leaves: the dtype of autocast, and a `Scaler`. Costs: of a scaler, one
pass over the gradients a step.

Weights, gradients of weights, AdamW and the losses are float32 in any of them; autocast makes the products in 16 bits.
float16 has more digits than bfloat16 and less range: a gradient below 6e-8 is zero in it. So the loss is multiplied by
a scale before the backward pass and the gradients are divided by it after (Micikevicius et al. 2018, arXiv 1710.03740).
A step whose gradients overflow under it is left out and the scale halved, which is how the scale is found and no fault;
after GROWTH_STEPS steps without that it is doubled. A loss that is not finite itself, or gradients that overflow with
the scale at its floor, have another cause.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.pipeline.student.run_config import Precision

#: float16 needs no scale below it: gradients of a loss that is a mean.
FLOOR = 1.0
FIRST = 2.0**16
BACKOFF = 0.5
GROWTH_STEPS = 2000


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | Literal[False]:
    """What products are made in; False: in float32, without autocast. auto: bfloat16 on GPUs that have it. On a CPU
    without it autocast is slower than float32."""
    if precision == "auto":
        has = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has else False
    return {"float32": False, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]  # type: ignore[return-value]


class Scaler:
    """The scale of a run's losses; without one, where products are not made in float16, all of it does nothing."""

    def __init__(self, dtype: torch.dtype | Literal[False], device: torch.device) -> None:
        self.enabled = dtype == torch.float16
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=FIRST, backoff_factor=BACKOFF, growth_interval=GROWTH_STEPS, enabled=self.enabled
        )

    @property
    def scale(self) -> float | None:
        return float(self._scaler.get_scale()) if self.enabled else None

    def scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass starts from."""
        return self._scaler.scale(loss) if self.enabled else loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradients as they are without a scale, before they are clipped."""
        if self.enabled:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, on finite gradients."""
        if self.enabled:
            self._scaler.step(optimizer)
            self._scaler.update()
        else:
            optimizer.step()

    def back_off(self, loss: float) -> bool:
        """After a step whose loss or gradients are not finite: whether the scale was the cause. It is then halved."""
        scale = self.scale
        if scale is None:
            return False
        caused = loss - loss == 0.0 and scale > FLOOR
        self._scaler.update(max(FLOOR, scale * BACKOFF) if caused else scale)
        self.restore({**self._scaler.state_dict(), "_growth_tracker": 0})
        return caused

    def state(self) -> dict[str, Any] | None:
        """Plain numbers, for a checkpoint."""
        return dict(self._scaler.state_dict()) if self.enabled else None

    def restore(self, state: dict[str, Any] | None) -> None:
        """As it was in a checkpoint; None: of a run without scale."""
        if self.enabled and state is not None:
            self._scaler.load_state_dict(state)
