"""Entropy and mass from what a store keeps, against the whole distribution."""

import numpy as np
import pytest
from numpy.typing import NDArray

from stillroom.pipeline.report.teacher import entropy_of_topk, ks_up_to, mass_by_k, of_draws, of_full, of_topk
from stillroom.storage.records import BETAS, Float32, Sampled, TopK

V, K, R = 4000, 16, 40


@pytest.fixture(scope="module")
def logits() -> Float32:
    """Peaked and flat rows: a few ids high, the rest normal."""
    rng = np.random.default_rng(3)
    found = rng.normal(0, 1.8, (R, V))
    found[:, :20] += rng.uniform(0, 12, (R, 20))
    return found.astype(np.float32) + 30


def kept_of(logits_RV: Float32, counts: NDArray[np.int32] | None = None) -> TopK:
    """The exact top-k of these logits and its tail; counts: a nucleus."""
    order = np.argsort(-logits_RV, axis=1)[:, :K].astype(np.int32)
    kept = np.take_along_axis(logits_RV, order, 1)
    if counts is not None:
        unused = np.arange(K) >= counts[:, None]
        order, kept = np.where(unused, -1, order), np.where(unused, -np.inf, kept)
    left = logits_RV.astype(np.float64).copy()
    for row, ids in enumerate(order):
        left[row, ids[ids >= 0]] = -np.inf
    tail = np.stack([np.logaddexp.reduce(left * beta, axis=1) for beta in BETAS], axis=1)
    return TopK(order, kept.astype(np.float32), tail.astype(np.float32), counts)


def exact_entropy(logits_RV: Float32) -> NDArray[np.float64]:
    p = softmax(logits_RV)
    return np.asarray(-(p * np.log(p)).sum(1))


def softmax(logits_RV: Float32, temperature: float = 1.0) -> NDArray[np.float64]:
    x = logits_RV.astype(np.float64) / temperature
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def test_entropy_from_kept_ids_and_the_curve_counts_the_tail(logits: Float32) -> None:
    found, exact = entropy_of_topk(kept_of(logits), V), exact_entropy(logits)
    assert np.abs(found - exact).max() < 0.01  # as one bucket the tail would be up to 8 nats too low
    assert exact.max() - exact.min() > 2


def test_a_nucleus_too(logits: Float32) -> None:
    counts = (1 + np.arange(R) % K).astype(np.int32)
    np.testing.assert_allclose(entropy_of_topk(kept_of(logits, counts), V), exact_entropy(logits), atol=0.05)


def test_mass_is_that_of_the_sorted_probabilities(logits: Float32) -> None:
    ks, temperatures = [1, 4, 16], [1.0, 2.0, 5.0]
    found = mass_by_k(kept_of(logits), V, ks=ks, temperatures=temperatures)
    for row, temperature in enumerate(temperatures):
        share = np.cumsum(-np.sort(-softmax(logits, temperature), axis=1).mean(0))
        np.testing.assert_allclose(found[row], share[np.array(ks) - 1], atol=1e-4)


def test_rows_of_the_whole_vocabulary_agree_with_those_of_the_top_k(logits: Float32) -> None:
    full, kept = of_full(logits, K), of_topk(kept_of(logits), V)
    np.testing.assert_array_equal(full.ids, kept.ids)
    np.testing.assert_allclose(full.probabilities, kept.probabilities, atol=1e-6)
    np.testing.assert_allclose(full.entropy, exact_entropy(logits), atol=1e-5)
    np.testing.assert_allclose(full.tail_lse, kept.tail_lse, atol=1e-3)


def test_draws_are_shares() -> None:
    rows = of_draws(Sampled(np.array([[3, 7, -1]], np.int32), np.array([[1, 3, 0]], np.int32)))
    assert rows.ids.tolist() == [[7, 3, -1]]
    np.testing.assert_allclose(rows.probabilities, [[0.75, 0.25, 0.0]], atol=1e-6)
    assert rows.entropy[0] == pytest.approx(0.5623, abs=1e-4)


def test_ks() -> None:
    assert [ks_up_to(k) for k in (1, 8, 12)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8, 12]]
