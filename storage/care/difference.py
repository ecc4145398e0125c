"""How far two scorings of the same positions are apart, and how far they may be.

Enters: what a store holds of some rows, and the same rows scored again and rounded by the same codec. Leaves: a few
numbers, and which of them are outside the noise band. Costs: one sort of the kept ids of both.

Two scorings of one teacher are bit-equal where hardware, libraries and batch shapes are the same. Elsewhere they
differ by floating point (DESIGN: KL 3e-7 in float32; 1e-4 mean and 5e-3 worst in bfloat16), and where a logit lies on
the border between two steps, by a whole step of the codec.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.records import Sampled, Signal, SignalSpec, TopK


@dataclass(frozen=True)
class Difference:
    """None for what the signal does not hold.

    kl_mean_nats, kl_worst_nats: KL(stored ‖ scored again) at T = 1 over the ids that both keep, and all else as one;
        and for each id that one side alone keeps, with log-probability l, the l − l_low by which it must have fallen at
        least below the other's lowest kept one, weighed by its probability. Without that two scorings that have no id
        in common would seem equal.
    logit_worst_nats: largest |Δ logit| of the ids that both keep. id_overlap: mean share of the stored ids that were
        kept again.
    draws_equal: mean share of the draws that fell on the same ids again.
    hidden_error: mean of |Δh| / |h|; layers_error: the same of each layer, and the largest of their means.
    attention_distance: mean total variation between a row and itself, 0 … 1.
    """

    positions: int
    bit_equal: bool
    kl_mean_nats: float | None = None
    kl_worst_nats: float | None = None
    logit_worst_nats: float | None = None
    id_overlap: float | None = None
    draws_equal: float | None = None
    hidden_error: float | None = None
    layers_error: float | None = None
    attention_distance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Band:
    """Limits of a `Difference`. source: where they are from, in words."""

    kl_mean_nats: float
    kl_worst_nats: float
    draws_equal: float
    hidden_error: float  # also of layers, and of attention's distance
    source: str

    def misses(self, found: Difference) -> list[str]:
        """The numbers outside the band, in words."""
        missed = []
        for name, limit, least in (
            ("kl_mean_nats", self.kl_mean_nats, False),
            ("kl_worst_nats", self.kl_worst_nats, False),
            ("draws_equal", self.draws_equal, True),
            ("hidden_error", self.hidden_error, False),
            ("layers_error", self.hidden_error, False),
            ("attention_distance", self.hidden_error, False),
        ):
            value = getattr(found, name)
            if value is not None and not (value >= limit if least else value <= limit):
                missed.append(f"{name} {value:.3g}, expected {'at least' if least else 'at most'} {limit:.3g}")
        return missed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def band_of(dtype: str, signal: SignalSpec, measured: tuple[float, float] | None = None) -> Band:
    """What a store of this dtype may differ by.

    measured: mean and worst KL of the store's own fidelity sample, scored in a batch and alone. Three times that counts
    where it is more than what is usual: it is of 256 positions, and of one machine.

    The codec adds, of two logits that may be rounded to different steps: s²/24 in the mean (half the variance of an
    error that is uniform in a step s), s²/2 at worst. Systematic draws follow every shift of the cumulative
    distribution; measured on SmolLM2-135M with N = 50 and noise added to the logits, share of equal draws against KL:
    0.97 at 2e-7, 0.93 at 7e-6, 0.89 at 6e-5, 0.84 at 7e-4; 0.72 where the logits were scaled by 0.9, 0.03 for another
    position.
    """
    precise = dtype == "float32"
    mean, worst = (1e-5, 1e-3) if precise else (1e-3, 5e-2)
    source = f"usual for {dtype}"
    if measured is not None and 3 * measured[0] > mean:
        mean, worst, source = 3 * measured[0], max(worst, 3 * measured[1]), "three times the store's own noise band"
    step = (signal.topk.gap_step if signal.topk else None) or 0.0
    draws, hidden = (0.9, 0.02) if precise else (0.8, 0.1)
    return Band(mean + step**2 / 24, worst + step**2 / 2, draws, hidden, source)


def difference(stored: Signal, again: Signal) -> Difference:
    """Of two signals of the same rows and parts, both as a reader decodes them."""
    assert len(stored) == len(again)
    numbers: dict[str, float] = {}
    if stored.topk is not None and again.topk is not None:
        numbers |= _of_topk(stored.topk, again.topk)
    if stored.sampled is not None and again.sampled is not None:
        numbers["draws_equal"] = _of_draws(stored.sampled, again.sampled)
    if stored.hidden is not None and again.hidden is not None:
        numbers["hidden_error"] = _of_hidden(stored.hidden, again.hidden)
    if stored.layers is not None and again.layers is not None:
        pairs = zip(stored.layers.swapaxes(0, 1), again.layers.swapaxes(0, 1), strict=True)
        numbers["layers_error"] = max(_of_hidden(held, found) for held, found in pairs)
    if stored.attention is not None and again.attention is not None:
        apart = float(np.abs(stored.attention.values - again.attention.values).sum(dtype=np.float64))
        rows = stored.attention.layers * stored.attention.heads * len(stored)
        numbers["attention_distance"] = apart / 2 / rows
    return Difference(len(stored), _equal(stored, again), **numbers)


def _equal(stored: Signal, again: Signal) -> bool:
    pairs: list[tuple[Any, Any]] = [(stored.hidden, again.hidden), (stored.layers, again.layers)]
    if stored.attention is not None and again.attention is not None:
        pairs.append((stored.attention.values, again.attention.values))
    if stored.topk is not None and again.topk is not None:
        pairs += [(getattr(stored.topk, n), getattr(again.topk, n)) for n in ("ids", "logits", "tail_lse", "counts")]
    if stored.sampled is not None and again.sampled is not None:
        pairs += [(getattr(stored.sampled, n), getattr(again.sampled, n)) for n in ("ids", "counts")]
    return all(a is b is None or np.array_equal(a, b) for a, b in pairs)


def _of_topk(stored: TopK, again: TopK) -> dict[str, float]:
    p, q = _Kept.of(stored), _Kept.of(again)
    both_p, both_q = _common(p.keys, q.keys)
    rows = p.rows[both_p]
    log_p, log_q = p.log_p[both_p], q.log_p[both_q]
    shared = np.bincount(rows, np.exp(log_p) * (log_p - log_q), minlength=len(stored))
    rest_p, rest_q = p.rest(both_p), q.rest(both_q)
    kl_R = np.maximum(shared + rest_p * (np.log(rest_p) - np.log(rest_q)), 0.0)
    kl_R += p.fallen(both_p, q.lowest) + q.fallen(both_q, p.lowest)
    apart = np.abs(p.logits[both_p] - q.logits[both_q])
    return {
        "kl_mean_nats": float(kl_R.mean()),
        "kl_worst_nats": float(kl_R.max()),
        "logit_worst_nats": float(apart.max(initial=0.0)),
        "id_overlap": float((np.bincount(rows, minlength=len(stored)) / stored.kept).mean()),
    }


@dataclass(frozen=True)
class _Kept:
    """The kept ids of R rows, end to end, sorted by row and id.

    log_p: at T = 1. lowest: float64 [R], of the lowest kept id. tail: float64 [R], probability of those not kept.
    """

    keys: NDArray[np.int64]
    rows: NDArray[np.int64]
    logits: NDArray[np.float64]
    log_p: NDArray[np.float64]
    lowest: NDArray[np.float64]
    tail: NDArray[np.float64]

    @staticmethod
    def of(topk: TopK) -> "_Kept":
        logits = topk.logits.astype(np.float64)
        tail = topk.tail_lse[:, -1].astype(np.float64)
        total = np.logaddexp(np.logaddexp.reduce(logits, axis=1), tail)
        used = np.arange(topk.ids.shape[1]) < topk.kept[:, None]
        row_RK = np.broadcast_to(np.arange(len(topk))[:, None], topk.ids.shape)
        keys = (row_RK[used] << 32) | topk.ids[used]
        order = np.argsort(keys)
        rows, values = row_RK[used][order], logits[used][order]
        lowest = np.take_along_axis(logits, topk.kept[:, None].astype(np.int64) - 1, axis=1)[:, 0]
        return _Kept(keys[order], rows, values, values - total[rows], lowest - total, np.exp(tail - total))

    def fallen(self, both: NDArray[np.int64], lowest: NDArray[np.float64]) -> NDArray[np.float64]:
        """Σ p (log p − lowest) over the ids that are not among `both` and lie above the other side's lowest."""
        alone = np.ones(len(self.keys), bool)
        alone[both] = False
        rows, log_p = self.rows[alone], self.log_p[alone]
        fallen = np.exp(log_p) * np.maximum(log_p - lowest[rows], 0.0)
        return np.bincount(rows, fallen, minlength=len(self.tail)).astype(np.float64)

    def rest(self, both: NDArray[np.int64]) -> NDArray[np.float64]:
        """Probability of all ids but those at `both`, summed without a difference: never 0."""
        alone = np.ones(len(self.keys), bool)
        alone[both] = False
        kept = np.bincount(self.rows[alone], np.exp(self.log_p[alone]), minlength=len(self.tail))
        return np.maximum(self.tail + kept, np.finfo(np.float64).tiny)


def _common(p: NDArray[np.int64], q: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the keys that both have stand in each."""
    at = np.minimum(np.searchsorted(q, p), len(q) - 1)
    both_p = np.flatnonzero(q[at] == p)
    return both_p, at[both_p]


def _of_draws(stored: Sampled, again: Sampled) -> float:
    """Σ min of both counts, over N."""
    sides = []
    for block in (stored, again):
        used = block.counts > 0
        row_RU = np.broadcast_to(np.arange(len(block))[:, None], block.ids.shape)
        sides.append(((row_RU[used].astype(np.int64) << 32) | block.ids[used], block.counts[used]))
    (p, p_counts), (q, q_counts) = sides
    both_p, both_q = _common(p, q)
    return float(np.minimum(p_counts[both_p], q_counts[both_q]).sum() / p_counts.sum())


def _of_hidden(stored: NDArray[np.float32], again: NDArray[np.float32]) -> float:
    size = np.linalg.norm(stored.astype(np.float64), axis=1)
    apart = np.linalg.norm(stored.astype(np.float64) - again, axis=1)
    return float((apart / np.maximum(size, np.finfo(np.float32).tiny)).mean())
