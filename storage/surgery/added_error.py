"""What surgery on a store added to its error: rows as they were decoded before, against those decoded after.

Enters: top-k rows, sequence by sequence. Leaves: KL by temperature, the worst change of a logit, the mass kept. Costs:
three exponentials per kept id of a compared position, 200,000 positions/s a core at k = 128 to 32.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.errors import StoreError
from stillroom.storage.order import mix
from stillroom.storage.records import Int32, TopK

#: At which the error is stated. Each is twice the one before.
TEMPERATURES = (1, 2, 4, 8)

#: A run compares all its positions up to here, and a sample of at least so many beyond.
COMPARED_POSITIONS = 65_536

Float64 = NDArray[np.float64]


class AddedError:
    """Sums over one run.

    For each T in 1, 2, 4, 8: the KL divergence in nats of the result's distribution from the source's, in which all
    that the result does not name is summed into one bucket. Beyond 65,536 positions a sample of that many is compared:
    row i of the run by a hash of i, so that no period of the text is favoured.

    rows: how many the run will have in all.
    """

    def __init__(self, vocabulary: int, rows: int) -> None:
        self._vocabulary = vocabulary
        # 5 % more: the number drawn has a standard deviation of 256.
        self._share = min(1.0, 1.05 * COMPARED_POSITIONS / max(rows, 1))
        self._seen = self._compared = 0
        self._worst_logit = 0.0
        self._by_temperature = {t: _Sums() for t in TEMPERATURES}

    def add(self, before: TopK, after: TopK, where: str) -> None:
        """Rows of one sequence. Raises StoreError naming `where` if the result is not made of the same ids."""
        index = np.arange(self._seen, self._seen + len(after), dtype=np.uint64)
        self._seen += len(after)
        chosen = np.flatnonzero(mix(index) < self._share * 2.0**64)
        if not len(chosen):
            return
        before, after = before[chosen], after[chosen]
        used = np.arange(after.ids.shape[1]) < after.kept[:, None]
        at = _places(before.ids, after.ids, used)
        if at is None:
            raise StoreError(
                f"{where} names ids that its source does not: what was written is not what was read; its unit is not "
                "committed, run the same command again, and report it if it stays"
            )
        same = np.where(used, np.take_along_axis(before.logits, at, axis=1), -np.inf).astype(np.float64)
        new = np.where(used, after.logits, -np.inf).astype(np.float64)
        gone = before.logits.astype(np.float64)
        gone[np.broadcast_to(np.arange(len(at))[:, None], at.shape)[used], at[used]] = -np.inf
        change = np.subtract(same, new, out=np.zeros_like(new), where=used)
        self._compared += len(chosen)
        self._worst_logit = max(self._worst_logit, float(np.abs(change).max()))
        self._add_divergence(before, after, same, gone, new, change)

    def _add_divergence(
        self, before: TopK, after: TopK, same: Float64, gone: Float64, new: Float64, change: Float64
    ) -> None:
        """same, gone: the source's logits of the ids that stay and of those that do not, −inf where unused; new: the
        result's; change: same − new. All [R, ≤ K].

        Relative to the top logit, which stays, so that no sum overflows or vanishes. T = 8 comes first: its
        exponentials, squared, are those of T = 4, and so on.
        """
        top = before.logits[:, :1].astype(np.float64)
        exp_same, exp_gone, exp_new = (np.exp((part - top) / TEMPERATURES[-1]) for part in (same, gone, new))
        for temperature in reversed(TEMPERATURES):
            beta = 1 / temperature
            tail_before, tail_after = (
                tail_lse_at(block.tail_lse, beta, self._vocabulary - block.kept) - beta * top[:, 0]
                for block in (before, after)
            )
            with np.errstate(divide="ignore"):  # nothing may be gone: log 0
                log_rest = np.logaddexp(np.log(exp_gone.sum(axis=1)), tail_before)
            log_z = np.logaddexp(np.log(exp_same.sum(axis=1)), log_rest)
            log_z_new = np.logaddexp(np.log(exp_new.sum(axis=1)), tail_after)
            # KL = Σ p (log p − log q): of logits without their Z, and one difference of both log Z, as p sums to 1.
            kl = beta * (exp_same * change).sum(axis=1) * np.exp(-log_z)
            kl += np.exp(log_rest - log_z) * (log_rest - tail_after) - (log_z - log_z_new)
            self._by_temperature[temperature].add(
                np.maximum(kl, 0.0),  # rounding alone can make it −1e-16
                -np.expm1(tail_before - log_z),
                -np.expm1(tail_after - log_z_new),
            )
            for part in (exp_same, exp_gone, exp_new):
                np.square(part, out=part)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; None where nothing was compared, as every number stayed what it was."""
        return {
            "positions_compared": self._compared,
            "worst_logit_change_nats": self._worst_logit if self._compared else None,
            "added": [
                {"temperature": t, **sums.as_dict()} for t, sums in self._by_temperature.items() if sums.positions
            ],
        }


@dataclass
class _Sums:
    """Over positions, at one temperature."""

    positions: int = 0
    kl: float = 0.0
    kl_worst: float = 0.0
    mass_before: float = 0.0
    mass_after: float = 0.0

    def add(self, kl_R: Float64, mass_before_R: Float64, mass_after_R: Float64) -> None:
        self.positions += len(kl_R)
        self.kl += float(kl_R.sum())
        self.kl_worst = max(self.kl_worst, float(kl_R.max(initial=0.0)))
        self.mass_before += float(mass_before_R.sum())
        self.mass_after += float(mass_after_R.sum())

    def as_dict(self) -> dict[str, float]:
        return {
            "kl_added_nats": self.kl / self.positions,
            "kl_added_worst_nats": self.kl_worst,
            "retained_mass_before": self.mass_before / self.positions,
            "retained_mass_after": self.mass_after / self.positions,
        }


def _places(ids_RK: Int32, wanted_RK: Int32, used: NDArray[np.bool_]) -> Any:
    """int64 [R, K']: where each wanted id stands in its row of `ids_RK`, 0 where unused; None if one does not.

    By id and not by rank: a layout may order ids of one rounded logit in another way.
    """
    width = wanted_RK.shape[1]
    if width <= ids_RK.shape[1] and np.array_equal(ids_RK[:, :width][used], wanted_RK[used]):
        return np.where(used, np.arange(width), 0)
    order = np.argsort(ids_RK, axis=1)
    step = np.arange(len(ids_RK), dtype=np.int64)[:, None] << 32
    known = (np.take_along_axis(ids_RK, order, axis=1) + step).ravel()  # rising over all rows: one search does
    at = np.minimum(np.searchsorted(known, wanted_RK + step), known.size - 1)
    if not (known[at] == wanted_RK + step)[used].all():
        return None
    return np.where(used, order.ravel()[at], 0)
