"""What a recipe asks of a store's fidelity, and the refusal of what a store does not reach.

Enters: measured fidelity (storage/fidelity/measure.py) and a recipe's bound. Leaves: nothing, or an error with the
measured number and the remedy. Costs: nothing.
"""

from dataclasses import dataclass

from stillroom.storage.errors import UnsupportedSignal
from stillroom.storage.fidelity.measure import Fidelity, Measured

#: How many times the bound an angle may be for a larger k to be worth a try.
NEAR = 1.25


@dataclass(frozen=True)
class Bound:
    """What a recipe asks of a store; None leaves a number free.

    max_gradient_angle_deg: of the mean gradient angle. max_kl_added: of the mean KL added, in nats.
    """

    max_gradient_angle_deg: float | None = None
    max_kl_added: float | None = None

    def misses(self, row: Measured) -> list[str]:
        """The recipe's keys that a row does not meet, with the numbers; empty if it meets all."""
        angle, kl = row.gradient_angle_deg, row.kl_added_nats
        found = []
        if self.max_gradient_angle_deg is not None and not angle <= self.max_gradient_angle_deg:
            found.append(
                f"gradient angle {angle:.3g}° against full KD, over fidelity.max_gradient_angle_deg = "
                f"{self.max_gradient_angle_deg:g}"
            )
        if self.max_kl_added is not None and kl is not None and not kl <= self.max_kl_added:
            found.append(f"KL added {kl:.2g} nats, over fidelity.max_kl_added = {self.max_kl_added:g}")
        return found


def supports(fidelity: Fidelity | None, tier: str, temperature: float, bound: Bound, *, where: str) -> None:
    """Refuse a tier and a temperature that a store cannot support within the recipe's bound.

    fidelity: measured at this temperature; None for a store that keeps no fidelity sample. where: the store, for the
    message. Draws at T ≠ 1 are refused whatever the bound, all else only by it.
    Raises UnsupportedSignal with the measured number and the remedy.
    """
    if "sampled" in tier.split("+") and temperature != 1:
        raise UnsupportedSignal(
            f"store {where}: draws estimate the teacher at T = 1 alone, T = {temperature:g} was asked for; "
            "train at temperature 1, or from a store with topk or hidden"
        )
    if bound == Bound():
        return
    if fidelity is None or not fidelity.rows:
        raise UnsupportedSignal(
            f"store {where} keeps no fidelity sample, so {tier} at T = {temperature:g} cannot be held against "
            "the recipe's bound; teach into a store that keeps one, or set fidelity.max_gradient_angle_deg and "
            "fidelity.max_kl_added to null to train unchecked"
        )
    row = fidelity.row(tier, temperature)
    if row is None:
        measured = ", ".join(f"{r.tier} at T = {r.temperature:g}" for r in fidelity.rows)
        raise UnsupportedSignal(
            f"store {where}: {tier} at T = {temperature:g} was not measured, and is not interpolated; "
            f"measured were {measured}: train from one of these, or from a store that keeps {tier}"
        )
    missed = bound.misses(row)
    if missed:
        raise UnsupportedSignal(
            f"store {where}: {tier} at T = {temperature:g} gives {' and '.join(missed)} (mean of {row.positions} "
            f"positions, {row.retained_mass:.3g} of the mass kept); {_remedy(fidelity, row, bound)}"
        )


def _remedy(fidelity: Fidelity, row: Measured, bound: Bound) -> str:
    """What is within the bound in this store, then what would be in another, then the bound itself."""
    within = [r for r in fidelity.rows if not bound.misses(r)]
    tiers = [f"tier {r.tier} of this store" for r in within if r.temperature == row.temperature]
    others = [f"T = {r.temperature:g} with {r.tier}" for r in within if r.temperature != row.temperature]
    store = f"a store with {_better(row, bound)}"
    return f"use {', '.join([*tiers, *others, store])}, or raise the bound in the recipe"


def _better(row: Measured, bound: Bound) -> str:
    if row.tier == "sampled":
        return "more draws or the topk tier"
    if row.tier == "topk+sampled":
        return "more draws or the hidden tier"
    if row.tier == "hidden":
        return "hidden in bfloat16"
    coarse = Bound(max_kl_added=bound.max_kl_added).misses(row)
    flat = Bound(max_gradient_angle_deg=bound.max_gradient_angle_deg).misses(row)
    most = bound.max_gradient_angle_deg or 0.0
    # Four times the ids took 16 % off the angle at T = 4, 30 % at T = 2: a larger k reaches what is near.
    larger = "a larger k or " if row.gradient_angle_deg <= NEAR * most else ""
    hidden = larger + "the hidden tier (signal.hidden: {dtype: int16}, in another store.path)"
    return " and ".join(["a finer gap_step"] * bool(coarse) + [hidden] * bool(flat))
