"""Which of the student's layers learns from which of the teacher's, of those that the store holds.

Enters: a recipe's `features`, the store's `SignalSpec`, the student's shape. Leaves: pairs (student, teacher), or one
line that lists what the store holds. Costs: nothing; no torch, so it is asked before a teacher has worked.

Layers are numbered as transformers numbers them: in `hidden_states` 0 is what enters the first block, i what leaves the
i-th, the last one the final state after the last norm; in `attentions` 0 is the first block's. A named map goes over
the S blocks of the student and the T blocks of the teacher that the store holds, from below, counted from 0 as the
chapter does (§4.2); a store of all blocks gives the chapter's own pairs.

    uniform     l ↦ ⌊l T / S⌋: of 12 and 60 layers 0 ↦ 0, 1 ↦ 5, …, 11 ↦ 55
    top_heavy   the chapter's pairs of 12 and 60 layers, 0 ↦ 0, 1 ↦ 2, 6 ↦ 20, 7 ↦ 30, 11 ↦ 59, with straight lines
                between them and scaled to S and T: it gives no formula
    every_k     uniform, and of it each k-th pair from the first on ("every 4th layer", §7.5)
    last        the student's last from the teacher's last: its final state where the store has signal.hidden, else the
                deepest that is held

Where fewer of the teacher's layers are held than the student has, as many of the student's learn, spread evenly.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stillroom.pipeline.student.features.config import (
    AttentionFeature,
    EmbeddingsFeature,
    FeaturesConfig,
    HiddenFeature,
    RelationsFeature,
)
from stillroom.storage.errors import StudentError, UnsupportedSignal
from stillroom.storage.records import SignalSpec

Pairs = tuple[tuple[int, int], ...]

#: The teacher's final state out of `signal.hidden`, which has no number in `signal.layers`.
FINAL = -1

#: The chapter's top-heavy pairs, of 12 and 60 layers.
_TOP_HEAVY = ((0, 0), (1, 2), (6, 20), (7, 30), (11, 59))


@dataclass(frozen=True)
class Shape:
    """A student: its blocks, the channels between them, the heads of each."""

    layers: int
    width: int
    heads: int


def shape_of(config: Any) -> Shape:
    """Of a transformers configuration. Raises StudentError if it does not state its layers, width and heads."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
    if not all(isinstance(number, int) for number in found):
        raise StudentError(
            f"the student's config ({config.model_type}) does not state num_hidden_layers, hidden_size and "
            "num_attention_heads: it cannot learn from inside a teacher"
        )
    return Shape(*(int(number) for number in found if number is not None))


def uniform(students: int, teachers: int) -> Pairs:
    """Places from 0 among so many layers of each."""
    count = min(students, teachers)
    return tuple((i * students // count, i * teachers // count) for i in range(count))


def top_heavy(students: int, teachers: int) -> Pairs:
    """Places from 0; several of the student's low layers may share one of the teacher's."""
    count = min(students, teachers)
    xs = [student / 11 for student, _ in _TOP_HEAVY]
    ys = [teacher / 59 for _, teacher in _TOP_HEAVY]
    found = []
    for i in range(count):
        x = i / max(count - 1, 1)
        at = next(number for number, (_, right) in enumerate(pairwise(xs)) if x <= right)
        y = ys[at] + (ys[at + 1] - ys[at]) * (x - xs[at]) / (xs[at + 1] - xs[at])
        found.append((i * students // count, int(y * (teachers - 1) + 0.5)))
    return tuple(found)


def every_k(students: int, teachers: int, k: int) -> Pairs:
    """Places from 0."""
    return uniform(students, teachers)[::k]


#: What keeps a section, in words of the command line.
_EXAMPLES = {"layers": "'{every: 4}'", "attention": "'{every: 4}'", "embeddings": "true"}


def require_held(features: FeaturesConfig, signal: SignalSpec) -> None:
    """Raises UnsupportedSignal if the store lacks what the features ask for, as far as the student does not matter."""
    for name, part in features.parts().items():
        held = _held(name, signal)
        final = name in ("hidden", "relations") and getattr(part, "map", None) == "last" and signal.hidden is not None
        if not held and not final:
            raise UnsupportedSignal(
                f"features.{name} needs signal.{_section(name)}, and the store holds {signal.in_words()}: teach "
                f"with signal.{_section(name)}={_EXAMPLES[_section(name)]} into another store.path"
            )
        wanted = [teacher for _, teacher in part.map] if hasattr(part, "map") and isinstance(part.map, tuple) else []
        lacking = sorted({teacher for teacher in wanted if teacher not in held})
        if lacking:
            raise UnsupportedSignal(
                f"features.{name}.map asks for the teacher's layers {_numbers(lacking)}, of which the store holds "
                f"{_numbers(held)} (signal.{_section(name)}): name these, or teach the others into another store"
            )
    attention = features.parts().get("attention")
    apart = isinstance(attention, AttentionFeature) and attention.heads == "per_head"
    if apart and signal.attention and signal.attention.head_count is None:
        raise UnsupportedSignal(
            f"features.attention.heads is per_head, and the store holds the mean over heads ({signal.in_words()}): set "
            "it to mean, or teach with signal.attention.heads per_head into another store"
        )


def named_layers(features: Seq[tuple[str, FeaturesConfig]]) -> tuple[int, ...]:
    """The teacher's hidden states that students name in pairs, rising. features: each with its student's name.

    Raises ValueError where a map names none, since it goes over what a store holds, and where there is none at all.
    """
    found: set[int] = set()
    for student, each in features:
        for name in ("hidden", "relations"):
            part = each.parts().get(name)
            if not isinstance(part, (HiddenFeature, RelationsFeature)) or part.map == "last":
                continue
            if not isinstance(part.map, tuple):
                raise ValueError(
                    f"signal.layers.named_by is students, but features.{name}.map of student {student} is {part.map}, "
                    "which goes over the layers that the store holds and names none: give pairs [student, teacher], "
                    "or signal.layers.every in the place of named_by"
                )
            found |= {teacher for _, teacher in part.map}
    if not found:
        raise ValueError(
            "signal.layers.named_by is students, and no student's features.hidden or relations names a layer: give "
            "one of them pairs [student, teacher] as its map, or signal.layers.layers in the place of named_by"
        )
    return tuple(sorted(found))


def resolve(features: FeaturesConfig, signal: SignalSpec, shape: Shape) -> dict[str, Pairs]:
    """The pairs of each part, as numbered by transformers.

    Raises UnsupportedSignal for what the store lacks, StudentError for what the student lacks or where the two do not
    fit: other head counts, other widths without a projection.
    """
    require_held(features, signal)
    return {name: _pairs(name, part, signal, shape) for name, part in features.parts().items()}


def widths(signal: SignalSpec) -> int:
    """Channels of the teacher's hidden states."""
    part = signal.layers or signal.hidden
    assert part is not None
    return part.width


def _pairs(
    name: str,
    part: HiddenFeature | AttentionFeature | EmbeddingsFeature | RelationsFeature,
    signal: SignalSpec,
    shape: Shape,
) -> Pairs:
    if isinstance(part, (HiddenFeature, EmbeddingsFeature)):
        teacher = widths(signal)
        if part.projection == "none" and teacher != shape.width:
            raise StudentError(
                f"features.{name}.projection is none, but the student has {shape.width} channels and the teacher "
                f"{teacher}: set it to auto"
            )
    if isinstance(part, EmbeddingsFeature):
        return ((0, 0),)
    if isinstance(part, AttentionFeature) and part.heads == "per_head":
        assert signal.attention is not None
        if signal.attention.head_count != shape.heads:
            raise StudentError(
                f"features.attention.heads is per_head, but the student has {shape.heads} heads and the store's maps "
                f"{signal.attention.head_count}: set it to mean"
            )
    first = 0 if name == "attention" else 1
    if isinstance(part.map, tuple):
        _require_layers(name, part.map, shape)
        return part.map
    students = range(first, first + shape.layers)
    if part.map == "last":
        final = name != "attention" and signal.hidden is not None
        return ((students[-1], FINAL if final else _held(name, signal)[-1]),)
    # What enters the first block is no block's.
    teachers = [layer for layer in _held(name, signal) if layer >= first]
    if not teachers:
        raise UnsupportedSignal(
            f"features.{name}.map is {part.map}, and of the teacher's blocks the store holds none ({signal.in_words()})"
        )
    if part.map == "every_k":
        places = every_k(len(students), len(teachers), part.every)
    else:
        places = (uniform if part.map == "uniform" else top_heavy)(len(students), len(teachers))
    return tuple((students[s], teachers[t]) for s, t in places)


def _require_layers(name: str, pairs: Seq[tuple[int, int]], shape: Shape) -> None:
    """The student's side of explicit pairs: every layer is there, and learns from one only."""
    students = [student for student, _ in pairs]
    most = shape.layers - (name == "attention")
    beyond = sorted({student for student in students if student > most})
    if beyond:
        raise StudentError(f"features.{name}.map names the student's layers {_numbers(beyond)}, which has 0 … {most}")
    twice = sorted({student for student in students if students.count(student) > 1})
    if twice:
        raise StudentError(f"features.{name}.map names the student's layers {_numbers(twice)} more than once")


def _held(name: str, signal: SignalSpec) -> tuple[int, ...]:
    """Numbers of the teacher's layers that the store holds for a part."""
    if name == "attention":
        return signal.attention.layers if signal.attention else ()
    layers = signal.layers.layers if signal.layers else ()
    return tuple(layer for layer in layers if layer == 0) if name == "embeddings" else layers


def _section(name: str) -> str:
    return {"attention": "attention", "embeddings": "embeddings"}.get(name, "layers")


def _numbers(layers: Seq[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
