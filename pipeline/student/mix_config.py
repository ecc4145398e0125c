"""What a recipe's student says about the shares of the corpus's sources.

Enters: a `mix` section. Leaves: a frozen, checked model. Costs: no torch. What it says to do is in mix.py.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stillroom.pipeline.student.schedules import Scheduled, Value, extremes, shown
from stillroom.pipeline.student.section import Section


class MixConfig(Section):
    """How much of each step is learned from which source of the corpus. With `generations` as one of two sources this
    is β · sequence-level distillation + (1 − β) · ground truth, β its share."""

    by: Literal["weight", "sampling"] = "weight"
    """weight: loss of a step = Σ share · mean loss of that source's positions in the step. A source that a step has no
    position of leaves its share to the others; its `weight` in the corpus cancels out. sampling: every pack is of one
    source, drawn with its share; each source has epochs of its own, so `steps` says when to stop. The share is of
    packs, and every position counts as its source's `weight` in the corpus says."""

    shares: Annotated[dict[str, Scheduled], Field(min_length=1)]
    """By the source's name, a share in 0 … 1, a number or a schedule over the steps of the run. At most one source may
    be left out: it has the rest."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name, share in self.shares.items():
            low, high = extremes(share)
            if low < 0 or high > 1:
                raise ValueError(f"shares.{name}: must lie in 0 … 1, got {shown(share)}")
        return self

    def require_names(self, names: list[str], where: str = "mix") -> None:
        """Raises ValueError, in one line, for shares that do not go with sources of these names."""
        holds = f"the corpus has {', '.join(dict.fromkeys(names))}"
        for name in self.shares:
            if name not in names:
                raise ValueError(f"{where}.shares.{name}: no source has this name; {holds}")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{where}: several sources are called {twice[0]}: give each a `name` in corpus.sources")
        left = [name for name in names if name not in self.shares]
        if len(left) > 1:
            raise ValueError(f"{where}.shares leaves out {', '.join(left)}: one alone may have the rest; 0 is a share")


def require_sum(shares: Mapping[str, Value], sum_: float, step: int, *, whole: bool) -> None:
    """Raises ValueError where shares add up to more than 1, or with `whole` (all sources are named) to less."""
    if sum_ > 1 + SLACK or (whole and sum_ < 1 - SLACK):
        said = ", ".join(f"{name} {shown(share)}" for name, share in shares.items())
        more = "all sources are named, so they must add up to 1" if whole else "expected at most 1"
        raise ValueError(f"mix.shares ({said}) add up to {sum_:.6g} at step {step + 1}: {more}")


#: Of sums of shares, for rounding.
SLACK = 1e-6
