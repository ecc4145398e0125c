"""What can be made of a stored signal without its teacher.

Enters: what a store keeps, and what is asked for; top-k rows. Leaves: the new signal's spec, and its rows. Costs: one
exponential per id that is cut.

Rows only ever lose: ids join the tail, gaps are rounded to coarser steps, parts are left out. What was not kept cannot
be had from what was, and is refused with the remedy.
"""

from dataclasses import dataclass, replace
from typing import Literal

from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.codecs.topk import first_k, nucleus
from stillroom.storage.errors import UsageError
from stillroom.storage.records import PARTS, NucleusSpec, SignalSpec, TopK, TopKSpec, step_in_words

#: The coarsest step that a recipe may ask for: what no teacher run can found, surgery does not either.
COARSEST_STEP = 4.0

#: Why a part that is not there cannot be made of those that are.
_CANNOT = {
    "topk": "the output head would have to be run over hidden states, and draws rank nothing",
    "sampled": "draws need every id's probability, and the ids of the tail are not kept",
    "hidden": "a hidden state cannot be had from what it predicts",
    "layers": "inner hidden states cannot be had from what comes after them",
    "attention": "what the teacher attends to cannot be had from what comes after it",
}


@dataclass(frozen=True)
class Changes:
    """What is to be different; everything else stays as it is.

    k: kept ids. gap_step: nats, None for float32. layout: of the top-k part. nucleus: keep fewer where fewer hold
    enough. only: the parts to keep. drop: the parts to leave out.
    """

    k: int | None = None
    gap_step: float | Literal["same"] | None = "same"
    layout: Literal["plain", "packed"] | None = None
    nucleus: NucleusSpec | None = None
    only: tuple[str, ...] | None = None
    drop: tuple[str, ...] = ()

    @property
    def of_topk(self) -> bool:
        return self.k is not None or self.gap_step != "same" or self.layout is not None or self.nucleus is not None


def changed_signal(spec: SignalSpec, changes: Changes) -> SignalSpec:
    """The spec of the result.

    Raises UsageError where the data of `spec` do not determine what is asked, with the reason and the remedy.
    """
    parts = _parts(spec, changes)
    topk = spec.topk if "topk" in parts else None
    if changes.of_topk and topk is None:
        raise UsageError(
            "k, gap step, layout and nucleus are of the topk part, which "
            + ("is to be left out: ask for one or the other" if spec.topk else _missing("topk", spec))
        )
    return SignalSpec(
        _changed_topk(topk, changes) if topk else None,
        spec.sampled if "sampled" in parts else None,
        spec.hidden if "hidden" in parts else None,
        spec.layers if "layers" in parts else None,
        spec.attention if "attention" in parts else None,
    )


def _parts(spec: SignalSpec, changes: Changes) -> list[str]:
    held = [name for name in PARTS if getattr(spec, name) is not None]
    for name in (*(changes.only or ()), *changes.drop):
        if name not in PARTS:
            raise UsageError(f"a signal has no part {name!r}, expected {', '.join(PARTS)}")
    for name in changes.only or ():
        if name not in held:
            raise UsageError(f"part {name} {_missing(name, spec)}")
    absent = [name for name in changes.drop if name not in held]
    if absent:
        raise UsageError(f"part {absent[0]} cannot be dropped: the store keeps {spec.in_words()} only")
    left = [name for name in held if name not in changes.drop and (changes.only is None or name in changes.only)]
    if not left:
        raise UsageError(f"no part of {spec.in_words()} would be left; keep {' or '.join(held)}")
    return left


def _missing(name: str, spec: SignalSpec) -> str:
    return (
        f"is not in the store, which keeps {spec.in_words()}: {_CANNOT[name]}; teach again, into another store.path, "
        f"with signal.{name}"
    )


def _changed_topk(old: TopKSpec, changes: Changes) -> TopKSpec:
    return replace(
        old,
        k=_changed_k(old.k, changes.k),
        gap_step=old.gap_step if changes.gap_step == "same" else _changed_step(old.gap_step, changes.gap_step),
        nucleus=_changed_nucleus(old.nucleus, changes.nucleus),
        layout=changes.layout or old.layout,
    )


def _changed_k(old: int, new: int | None) -> int:
    if new is None:
        return old
    if new < 1:
        raise UsageError(f"k is {new}, expected 1 to {old}")
    if new > old:
        raise UsageError(
            f"k cannot grow from {old} to {new}: which ids lie behind the first {old} was not kept, only their sum; "
            f"teach again, into another store.path, with signal.topk.k {new}"
        )
    return new


def _changed_step(old: float | None, new: float | None) -> float | None:
    if new is not None and not 0 < new <= COARSEST_STEP:
        raise UsageError(f"gap step is {new:g} nats, expected above 0 and at most {COARSEST_STEP:g}, or none (float32)")
    if old is not None and (new is None or new < old):
        held, asked = step_in_words(old), None if new is None else step_in_words(new)
        raise UsageError(
            f"gap step {asked or 'none'} is finer than the store's {held}: rounding cannot be undone; ask for {held} "
            f"or a coarser one, or teach again, into another store.path, with signal.topk.gap_step {asked or 'null'}"
        )
    return new


def _changed_nucleus(old: NucleusSpec | None, new: NucleusSpec | None) -> NucleusSpec | None:
    if new is None:
        return old
    if not 0 < new.mass < 1 or not 1 <= new.temperature <= 10:
        raise UsageError(
            f"nucleus {new.mass:g}@{new.temperature:g}: expected a mass between 0 and 1, and a temperature of 1 to 10"
        )
    if old is not None and (new.temperature != old.temperature or new.mass > old.mass):
        raise UsageError(
            f"nucleus {new.mass:g}@{new.temperature:g} may need ids that the store's nucleus "
            f"{old.mass:g}@{old.temperature:g} did not keep; ask for a mass of at most {old.mass:g} at T = "
            f"{old.temperature:g}, or teach again, into another store.path, with signal.topk.nucleus"
        )
    return new


def logit_error_bound(old: TopKSpec, new: TopKSpec) -> float:
    """Nats by which a stored logit may be off the teacher's: half a step for each rounding that it went through."""
    rounded = [old.gap_step or 0.0]
    if new.gap_step != old.gap_step:
        rounded.append(new.gap_step or 0.0)
    return sum(rounded) / 2


def cut(block: TopK, source: TopKSpec, target: TopKSpec, vocabulary: int) -> TopK:
    """Rows of `source` as rows of `target`, which `changed_signal` made; not rounded yet, which is the codec's.

    What is cut joins the tail exactly, up to float32's rounding and the decoded logits' own error.
    """
    block = first_k(block, target.k)
    if target.nucleus is None or target.nucleus == source.nucleus:
        return block
    temperature = target.nucleus.temperature
    tail_R = tail_lse_at(block.tail_lse, 1 / temperature, vocabulary - block.kept)
    return nucleus(block, target.nucleus.mass, temperature, tail_R)
