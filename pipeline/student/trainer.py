"""One optimizer step, and nothing around it.

Enters: the packs of a step. Leaves: changed weights and a `StepResult`. Costs: forward and backward of the student;
memory of one micro-batch and of AdamW (12 bytes a parameter in all).

The loss of a step is Σ weight · loss over all its positions, divided by Σ weight of the whole step: how packs are
grouped into micro-batches or shared out among processes, and how many positions each holds, does not weigh.
"""

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.pipeline.student.collate import Batch, collate, real_tokens
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.curriculum import Stage, Values, stage_of, stages
from stillroom.pipeline.student.distributed import ALONE, Blamed, Ranks
from stillroom.pipeline.student.features.config import FeaturesConfig
from stillroom.pipeline.student.features.losses import Features, Together
from stillroom.pipeline.student.forward import hidden_at, logits_at, student_head
from stillroom.pipeline.student.lora import Adapters
from stillroom.pipeline.student.losses import LossSums, Objective, StudentHead
from stillroom.pipeline.student.precision import Scaler, autocast_dtype
from stillroom.pipeline.student.teaching import TOPK, Teaching, distillation_loss, distillation_loss_fused
from stillroom.storage.errors import NonFiniteLoss, StudentError
from stillroom.storage.records import Pack


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Means over the step's trained weight. kd holds the factor T². kd or ce is None if its coefficient is zero;
    all are None in a skipped step. features: by name, each without its weight. values: what the step was done with;
    phase: from 0. tokens: real ones read; trained: positions with loss. scale: of the loss, in float16; overflowed:
    whether the gradients did so under it, so that the weights stayed and grad_norm is None."""

    loss: float | None
    kd: float | None
    ce: float | None
    features: dict[str, float]
    grad_norm: float | None
    values: Values
    phase: int
    tokens: int
    trained: int
    skipped: bool
    scale: float | None = None
    overflowed: bool = False


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices; none on norms, biases and embeddings (with a head tied to them)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1 and id(p) not in embeddings]
    rest = [p for p in parameters if p.dim() <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def choose_head(model: Any, config: StudentConfig, device: torch.device) -> tuple[StudentHead | None, str]:
    """The head for the fused form, or None for the plain form; and a line that says which and why.

    Raises StudentError where `losses.fused` is true and the head has no formula.
    """
    if config.losses.fused is False:
        return None, "output head and loss: the plain form (losses.fused is false)"
    found = student_head(model, device=device)
    if isinstance(found, StudentHead):
        return found, "output head and loss: fused, in slices of positions"
    if config.losses.fused is True:
        raise StudentError(
            f"losses.fused is true, but {type(model).__name__} cannot have it: {found}; set it to auto or false"
        )
    return None, f"output head and loss: the plain form ({type(model).__name__}: {found})"


class Trainer:
    """Model, optimizer and the settings of a step. units_of: ids of the store's units that hold sequences, for
    messages; None where there is no store."""

    def __init__(
        self,
        model: Any,
        config: StudentConfig,
        *,
        vocabulary: int,
        total_steps: int,
        device: torch.device,
        teaching: Teaching = TOPK,
        features: Features | None = None,
        ranks: Ranks = ALONE,
        units_of: Callable[[Iterable[str]], list[str]] | None = None,
    ) -> None:
        self.model = model
        self.features = features
        self.config = config
        self.device = device
        self.autocast = autocast_dtype(config.precision, device)
        self.scaler = Scaler(self.autocast, device)
        self._vocabulary = vocabulary
        self._teaching = teaching
        self.head, self.form = choose_head(model, config, device)
        self._stages = stages(config, total_steps)
        groups = parameter_groups(model, config.weight_decay)
        learned = list(features.parameters()) if features else []
        if learned:
            groups.append({"params": learned, "weight_decay": config.weight_decay})
        self._parameters = [*model.parameters(), *learned]
        self._ranks, self._units_of = ranks, units_of
        self._whole_of = ranks.reducing(self._whole, [model, *([features] if features else [])])
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)

    @property
    def kept(self) -> Any:
        """What a checkpoint holds: the model or its adapters, and what is learned beside it."""
        model = self.model if self.config.lora is None else Adapters(self.model)
        return model if self.features is None else Together(model, self.features)

    def step(self, packs: Seq[Pack], step: int) -> StepResult:
        """Optimizer step number `step`, from 0, on these packs: of several processes, each one's part.

        Raises NonFiniteLoss naming them and their units if loss or gradient is not finite and `on_nan` is "stop"; on
        all processes, naming the packs of those that met it.
        """
        config = self.config
        stage = stage_of(self._stages, step)
        values = stage.values(step, config)
        objective = Objective.of(stage.losses, step - stage.first, stage.steps)
        tokens, trained, weight = self._counts(packs)
        if weight == 0.0:  # masks or weights of zero all through: nothing to learn from
            return _skipped(values, stage, tokens, trained)
        self.model.train()
        means, own = self._backward(packs, weight, objective, stage.features, values.weights)
        loss = means.pop("loss")
        assert loss is not None
        scale = self.scaler.scale
        self.scaler.unscale(self.optimizer)
        limit = math.inf if config.grad_clip is None else config.grad_clip
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = values.lr
            self.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        overflowed = not finite and self.scaler.back_off(loss)
        if not finite and not overflowed:
            if config.on_nan == "stop":
                raise NonFiniteLoss(self._explain(self._ranks.blamed(packs, own), step, loss, norm, values.lr, scale))
            return _skipped(values, stage, tokens, trained)
        return StepResult(
            loss=loss, kd=means.pop("kd"), ce=means.pop("ce"),
            features={name: mean for name, mean in means.items() if mean is not None},
            grad_norm=None if overflowed else norm, values=values, phase=stage.number, tokens=tokens, trained=trained,
            skipped=False, scale=scale, overflowed=overflowed,
        )  # fmt: skip

    def _counts(self, packs: Seq[Pack]) -> tuple[int, int, float]:
        """(real tokens, positions that train, Σ weight) of a step over all processes."""
        counts = (sum(map(real_tokens, packs)), sum(len(p.positions) for p in packs))
        weight = sum(float(p.weights.sum(dtype="f8")) for p in packs)
        tokens, trained, weight = self._ranks.total(np.array([*counts, weight])).tolist()
        return int(tokens), int(trained), weight

    def _backward(
        self,
        packs: Seq[Pack],
        weight: float,
        objective: Objective,
        asked: FeaturesConfig | None,
        shares: dict[str, float],
    ) -> tuple[dict[str, float | None], float]:
        """Accumulate the step's gradient; return the means of `_whole`, and this process' part of the loss.
        shares: weights of the feature losses."""
        config = self.config
        asked = asked if shares else None
        wanted = self.features.wanted(asked) if self.features and asked else None
        sums: dict[str, list[Tensor | None]] = {name: [] for name in ("loss", "kd", "ce", *shares)}
        parts = [packs[start : start + config.micro_packs] for start in range(0, len(packs), config.micro_packs)]
        parts = [micro for micro in parts if any(pack.weights.any() for pack in micro)]
        for number, micro in enumerate(parts, 1):
            batch = collate(
                micro, packing=config.packing, temperature=objective.temperature, vocabulary=self._vocabulary,
                wanted=wanted,
            ).to(self.device)  # fmt: skip
            with self._whole_of.turn(last=number == len(parts)):
                found = self._whole_of(batch, objective, asked, shares)
                self.scaler.scaled(found["loss"] / (weight / self._ranks.world)).backward()
            for name, value in found.items():
                sums[name].append(_detached(value))
        if not parts:
            self._whole_of.nothing()
        own = {name: _sum(values) for name, values in sums.items()}
        totals = self._ranks.sums(own)
        return {name: None if total is None else total / weight for name, total in totals.items()}, own["loss"] or 0.0

    def _whole(
        self, batch: Batch, objective: Objective, asked: FeaturesConfig | None, shares: dict[str, float]
    ) -> dict[str, Tensor | None]:
        """Of one forward: "loss", which has a gradient, "kd", "ce", and feature losses without their weights."""
        with self.features.listening(asked) if self.features else nullcontext() as captured:
            part = self._loss(batch, objective)
        whole, inner = part.total, {}
        if self.features and asked and captured:
            assert batch.features is not None
            inner = self.features.losses(
                asked, captured, batch.keep, batch.features, batch.targets.weights, names=shares
            )
            for name, value in inner.items():
                whole = whole + shares[name] * value
        found = {"kd": part.kd, "ce": part.ce, **inner}
        return {"loss": whole, **{name: _detached(value) for name, value in found.items()}}

    def _loss(self, batch: Batch, objective: Objective) -> LossSums:
        """Of one forward, with a gradient."""
        settings: dict[str, Any] = {
            "objective": objective, "vocabulary": self._vocabulary, "teaching": self._teaching,
        }  # fmt: skip
        with torch.autocast(self.device.type, dtype=self.autocast or None, enabled=bool(self.autocast)):
            if self.head is not None:
                return distillation_loss_fused(hidden_at(self.model, batch), self.head, batch.targets, **settings)
            logits_MV = logits_at(self.model, batch)
        return distillation_loss(logits_MV, batch.targets, **settings)

    def _explain(self, blamed: Blamed, step: int, loss: float, norm: float, lr: float, scale: float | None) -> str:
        sequences = [digest for _, digests in blamed for digest in digests]
        units = self._units_of(sequences) if self._units_of else []
        scaled = (
            "" if scale is None else f" in float16, its loss scaled by {scale:g} (bfloat16 and float32 reach further)"
        )
        where = f"units {_listed(units)}; " if units else ""
        return (
            f"step {step + 1}: loss {loss:g}, gradient norm {norm:g} at lr {lr:.2e}{scaled}; {where}packs "
            f"{', '.join(pack for pack, _ in blamed)} (epoch/number), sequences {_listed(sequences)}. Lower lr or "
            "raise warmup_steps; `on_nan: skip` leaves such steps out; the last checkpoint is from before."
        )


def _skipped(values: Values, stage: Stage, tokens: int, trained: int) -> StepResult:
    return StepResult(
        loss=None, kd=None, ce=None, features={}, grad_norm=None, values=values, phase=stage.number, tokens=tokens,
        trained=trained, skipped=True,
    )  # fmt: skip


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _sum(parts: list[Tensor | None]) -> float | None:
    present = [part for part in parts if part is not None]
    return float(torch.stack(present).sum()) if present else None


def _listed(names: list[str]) -> str:
    """The first eight, and how many there are."""
    return ", ".join(names[:8]) + (f" … ({len(names)} in all)" if len(names) > 8 else "")
