"""One optimizer step, and nothing around it.

Enters: the packs of a step. Leaves: changed weights and a `StepResult`. Costs: forward and backward of the student;
memory of one micro-batch and of AdamW (12 bytes a parameter in all).

The loss of a step is Σ weight · loss over all its positions, divided by Σ weight of the whole step: how packs are
grouped into micro-batches, and how many positions each holds, does not weigh.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.pipeline.student.collate import collate, real_tokens
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.forward import logits_at
from stillroom.pipeline.student.schedules import learning_rate
from stillroom.pipeline.student.teaching import TOPK, Teaching, distillation_loss
from stillroom.storage.errors import NonFiniteLoss
from stillroom.storage.records import Pack


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Means over the step's trained weight. kd holds the factor T². kd or ce is None if its coefficient is zero;
    all are None in a skipped step. tokens: real ones read; trained: positions with loss."""

    loss: float | None
    kd: float | None
    ce: float | None
    grad_norm: float | None
    lr: float
    tokens: int
    trained: int
    skipped: bool


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices; none on norms, biases and embeddings (with a head tied to them)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1 and id(p) not in embeddings]
    rest = [p for p in parameters if p.dim() <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def use_bf16(choice: bool | str, device: torch.device) -> bool:
    """auto: on GPUs that have bfloat16. On a CPU without it autocast is slower than float32."""
    if choice == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return bool(choice)


class Trainer:
    """Model, optimizer and the settings of a step."""

    def __init__(
        self,
        model: Any,
        config: StudentConfig,
        *,
        vocabulary: int,
        total_steps: int,
        device: torch.device,
        teaching: Teaching = TOPK,
    ) -> None:
        self.model = model
        self.config = config
        self.device = device
        self.autocast = use_bf16(config.bf16, device)
        self._vocabulary = vocabulary
        self._teaching = teaching
        self._total_steps = total_steps
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas
        )

    def step(self, packs: Seq[Pack], step: int) -> StepResult:
        """Optimizer step number `step`, from 0, on these packs.

        Raises NonFiniteLoss naming them if loss or gradient is not finite and `on_nan` is "stop".
        """
        config = self.config
        lr = learning_rate(
            step, total_steps=self._total_steps, peak=config.lr, warmup_steps=config.warmup_steps,
            schedule=config.schedule, min_ratio=config.min_lr_ratio,
        )  # fmt: skip
        tokens, trained = sum(map(real_tokens, packs)), sum(len(p.positions) for p in packs)
        weight = sum(float(p.weights.sum(dtype="f8")) for p in packs)
        if weight == 0.0:  # masks or weights of zero all through: nothing to learn from
            return StepResult(
                loss=None, kd=None, ce=None, grad_norm=None, lr=lr, tokens=tokens, trained=trained, skipped=True
            )
        self.model.train()
        loss, kd, ce = self._backward(packs, weight)
        limit = math.inf if config.grad_clip is None else config.grad_clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            if config.on_nan == "stop":
                raise NonFiniteLoss(_explain(packs, step, loss, norm, lr))
            return StepResult(
                loss=None, kd=None, ce=None, grad_norm=None, lr=lr, tokens=tokens, trained=trained, skipped=True
            )
        return StepResult(loss=loss, kd=kd, ce=ce, grad_norm=norm, lr=lr, tokens=tokens, trained=trained, skipped=False)

    def _backward(self, packs: Seq[Pack], weight: float) -> tuple[float, float | None, float | None]:
        """Accumulate the step's gradient; return its mean loss, kd and ce."""
        config = self.config
        sums: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        for start in range(0, len(packs), config.micro_packs):
            micro = packs[start : start + config.micro_packs]
            if not any(pack.weights.any() for pack in micro):
                continue
            batch = collate(
                micro, packing=config.packing, temperature=config.losses.temperature, vocabulary=self._vocabulary
            ).to(self.device)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                logits_MV = logits_at(self.model, batch)
            part = distillation_loss(
                logits_MV, batch.targets, alpha=config.losses.alpha,
                temperature=config.losses.temperature, vocabulary=self._vocabulary, teaching=self._teaching,
            )  # fmt: skip
            (part.total / weight).backward()
            sums.append((part.total.detach(), _detached(part.kd), _detached(part.ce)))
        total, kd, ce = (_mean([row[i] for row in sums], weight) for i in range(3))
        assert total is not None
        return total, kd, ce


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _mean(parts: list[Tensor | None], weight: float) -> float | None:
    present = [part for part in parts if part is not None]
    return float(torch.stack(present).sum()) / weight if present else None


def _explain(packs: Seq[Pack], step: int, loss: float, norm: float, lr: float) -> str:
    sequences = [digest for pack in packs for digest in pack.sequences]
    shown = ", ".join(sequences[:8]) + (f" … ({len(sequences)} in all)" if len(sequences) > 8 else "")
    return (
        f"step {step + 1}: loss {loss:g}, gradient norm {norm:g} at lr {lr:.2e}; packs "
        f"{', '.join(f'{p.epoch}/{p.index}' for p in packs)} (epoch/number), sequences {shown}. Lower lr or raise "
        "warmup_steps; `on_nan: skip` leaves such steps out; the last checkpoint is from before."
    )
