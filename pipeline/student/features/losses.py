"""The feature losses of a run: what is captured, what is read, what is learned beside the student.

Enters: a `StudentConfig`, the store's `SignalSpec`, the student. Leaves: sums of each feature loss in a forward. Costs:
those of `hidden`, `attention` and `relations`; a learned matrix takes student width · teacher width · 4 bytes.

    features = Features.of(config, signal, model, device)
    with features.listening(stage.features) as captured:
        …  # the forward
    sums = features.losses(stage.features, captured, batch.keep, batch.features, weights_M)
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.features.attention import attention_loss
from stillroom.pipeline.student.features.capture import Capture, Captured
from stillroom.pipeline.student.features.config import (
    AttentionFeature,
    EmbeddingsFeature,
    FeaturesConfig,
    HiddenFeature,
)
from stillroom.pipeline.student.features.hidden import projections, state_loss
from stillroom.pipeline.student.features.maps import FINAL, Pairs, resolve, shape_of, widths
from stillroom.pipeline.student.features.relations import relation_loss
from stillroom.pipeline.student.features.targets import FeatureTargets, Wanted
from stillroom.storage.records import SignalSpec


class Features(nn.Module):
    """The feature losses of all phases, with their learned matrices as parameters.

    Raises UnsupportedSignal for what the store lacks, StudentError for what the student lacks.
    """

    def __init__(self, config: StudentConfig, signal: SignalSpec, model: Any, device: torch.device) -> None:
        super().__init__()
        self._signal = signal
        shape = shape_of(model.config)
        self._pairs = {features: resolve(features, signal, shape) for features in config.all_features()}
        self._captures = {
            features: Capture(model, states=_states(pairs), maps=_maps(pairs), device=device)
            for features, pairs in self._pairs.items()
        }
        keys = {
            _key(name, pair)
            for features, found in self._pairs.items()
            for name, pairs in found.items()
            for pair in pairs
            if _projected(features.parts()[name], shape.width, widths_or(signal, shape.width))
        }
        self.matrices = projections(
            keys, student=shape.width, teacher=widths_or(signal, shape.width), seed=config.seed, device=device
        )

    @staticmethod
    def of(config: StudentConfig, signal: SignalSpec | None, model: Any, device: torch.device) -> "Features | None":
        """None where no phase learns from inside the teacher."""
        if not config.all_features():
            return None
        assert signal is not None, "features without a store"
        return Features(config, signal, model, device)

    @property
    def reads(self) -> frozenset[str]:
        """The parts of the store that any phase needs."""
        wanted = [self.wanted(features) for features in self._pairs]
        parts = {"layers"} if any(w.layers for w in wanted) else set()
        parts |= {"hidden"} if any(w.final for w in wanted) else set()
        return frozenset(parts | ({"attention"} if any(w.maps for w in wanted) else set()))

    def wanted(self, features: FeaturesConfig) -> Wanted:
        """What a forward under these features needs of its packs."""
        pairs = self._pairs[features]
        teachers = [teacher for name in pairs if name != "attention" for _, teacher in pairs[name]]
        attention = features.attention if "attention" in pairs else None
        return Wanted(
            layers=any(teacher != FINAL for teacher in teachers), final=FINAL in teachers,
            maps=attention.heads if attention else None,
        )  # fmt: skip

    @contextmanager
    def listening(self, features: FeaturesConfig | None) -> Iterator[Captured | None]:
        """While the student's forward runs inside, take what these features need."""
        with nullcontext() if features is None else self._captures[features].listening() as captured:
            yield captured

    def losses(
        self,
        features: FeaturesConfig,
        captured: Captured,
        keep_BT: Tensor,
        targets: FeatureTargets,
        weights_M: Tensor,
        *,
        names: Collection[str],
    ) -> dict[str, Tensor]:
        """Σ_m w_m · loss_m of each part among `names`, scalars, summed over its pairs and without the part's own
        weight."""
        found: dict[str, Tensor] = {}
        rows = {index: states_BTD[keep_BT] for index, states_BTD in captured.states.items()}
        for name, part in features.parts().items():
            if name not in names:
                continue
            terms = []
            for student, teacher in self._pairs[features][name]:
                if isinstance(part, AttentionFeature):
                    assert targets.maps is not None
                    assert self._signal.attention is not None
                    layer = self._signal.attention.layers.index(teacher)
                    terms.append(attention_loss(captured.maps[student], targets.maps, layer, weights_M=weights_M))
                    continue
                teacher_MD = self._teacher(targets, teacher)
                student_MD = rows[student]
                if isinstance(part, (HiddenFeature, EmbeddingsFeature)):
                    student_MD = self._project(_key(name, (student, teacher)), student_MD)
                    terms.append(state_loss(student_MD, teacher_MD, loss=part.loss, weights_M=weights_M))
                else:
                    terms.append(relation_loss(student_MD, teacher_MD, runs=targets.runs, weights_M=weights_M))
            found[name] = torch.stack(terms).sum()
        return found

    def _teacher(self, targets: FeatureTargets, layer: int) -> Tensor:
        if layer == FINAL:
            assert targets.final is not None
            return targets.final
        assert targets.layers is not None
        assert self._signal.layers is not None
        return targets.layers[:, self._signal.layers.layers.index(layer)]

    def _project(self, key: str, states_MD: Tensor) -> Tensor:
        if key not in self.matrices:
            return states_MD
        matrix = self.matrices[key]
        assert isinstance(matrix, nn.Linear)
        projected_MD: Tensor = matrix(states_MD.to(matrix.weight.dtype))
        return projected_MD


class Together:
    """A student and what is learned beside it, as one thing for a checkpoint; the student's names stay."""

    def __init__(self, model: Any, features: Features) -> None:
        self._model, self._features = model, features

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._model.named_parameters()
        yield from ((f"features.{name}", parameter) for name, parameter in self._features.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_buffers()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._model.state_dict()
        return state


def widths_or(signal: SignalSpec, width: int) -> int:
    """Channels of the teacher's states; the student's own where attention maps alone are held."""
    return widths(signal) if signal.layers or signal.hidden else width


def _projected(part: Any, student: int, teacher: int) -> bool:
    if not isinstance(part, (HiddenFeature, EmbeddingsFeature)):
        return False
    return part.projection == "linear" or (part.projection == "auto" and student != teacher)


def _key(name: str, pair: tuple[int, int]) -> str:
    """A matrix's name: the same pair in two phases has one."""
    teacher = "final" if pair[1] == FINAL else str(pair[1])
    return f"{name}_{pair[0]}_{teacher}"


def _states(found: dict[str, Pairs]) -> list[int]:
    return [student for name, pairs in found.items() if name != "attention" for student, _ in pairs]


def _maps(found: dict[str, Pairs]) -> list[int]:
    return [student for student, _ in found.get("attention", ())]
