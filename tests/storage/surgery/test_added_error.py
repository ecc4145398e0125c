"""added_error.py: the divergence that a transcoding adds, against a row by row reference."""

from typing import Any

import numpy as np
import pytest

from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.errors import StoreError
from stillroom.storage.records import TopK
from stillroom.storage.surgery.added_error import COMPARED_POSITIONS, TEMPERATURES, AddedError
from tests.storage.surgery.transcoding import V
from tests.strategies import nucleus_of, random_topk, topk_of


def reference_kl(before: TopK, after: TopK, temperature: float) -> float:
    """Row by row and id by id, over the buckets that `after` names."""
    beta, total = 1 / temperature, 0.0
    tails = [tail_lse_at(b.tail_lse, beta, V - b.kept).astype(np.float64) for b in (before, after)]
    for row in range(len(before)):
        p = {int(i): float(z) * beta for i, z in zip(before.ids[row], before.logits[row], strict=True) if i >= 0}
        q = {int(i): float(z) * beta for i, z in zip(after.ids[row], after.logits[row], strict=True) if i >= 0}
        log_p = np.array([*(p[i] for i in q), np.logaddexp.reduce([tails[0][row], *(p[i] for i in p if i not in q)])])
        log_q = np.array([*q.values(), tails[1][row]])
        log_p -= np.logaddexp.reduce(log_p)
        log_q -= np.logaddexp.reduce(log_q)
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return total / len(before)


class TestAddedError:
    def compared(self, before: TopK, after: TopK, **fields: int) -> dict[str, Any]:
        error = AddedError(V, fields.get("rows", len(before)))
        error.add(before, after, "result/shards/x.parquet")
        return error.as_dict()

    @pytest.mark.parametrize("kind", ["rounded", "cut", "nucleus", "shuffled"])
    def test_it_is_the_divergence_over_the_buckets_that_are_left(self, kind: str) -> None:
        rng = np.random.default_rng(3)
        logits = rng.normal(0, 3, (50, V)).astype(np.float32)
        before = topk_of(logits, 10)
        noise = rng.uniform(-0.1, 0.1, before.logits.shape).astype(np.float32)
        tail = before.tail_lse + rng.uniform(-0.1, 0.1, before.tail_lse.shape).astype(np.float32)
        noise[:, 0] = 0
        after = TopK(before.ids, before.logits + noise, tail)
        if kind == "cut":
            after = topk_of(logits, 4)
        if kind == "nucleus":
            before, after = nucleus_of(logits, 10, 0.9), nucleus_of(logits, 10, 0.6)
        if kind == "shuffled":
            order = np.argsort(after.ids, axis=1)
            ids, logits_RK = (np.take_along_axis(part, order, axis=1) for part in (after.ids, after.logits))
            after = TopK(ids.astype(np.int32), logits_RK.astype(np.float32), tail)
        found = self.compared(before, after)
        for row in found["added"]:
            assert row["kl_added_nats"] == pytest.approx(reference_kl(before, after, row["temperature"]), abs=2e-7)
            assert row["kl_added_worst_nats"] >= row["kl_added_nats"]
        if kind in ("rounded", "shuffled"):
            assert found["worst_logit_change_nats"] == pytest.approx(float(np.abs(noise).max()), abs=1e-5)
            assert found["added"][0]["kl_added_nats"] > 1e-4
        else:
            assert found["added"][0]["retained_mass_after"] < found["added"][0]["retained_mass_before"]

    def test_nothing_changed_is_nothing_added(self) -> None:
        block = random_topk(np.random.default_rng(0), 30, 8, V)
        found = self.compared(block, block)
        assert found["positions_compared"] == 30
        assert found["worst_logit_change_nats"] == 0.0
        assert all(row["kl_added_worst_nats"] < 1e-12 for row in found["added"])
        assert len(found["added"]) == len(TEMPERATURES)

    def test_other_ids_are_an_error(self) -> None:
        block = random_topk(np.random.default_rng(0), 3, 4, V)
        ids = block.ids.copy()
        ids[1, 2] = next(i for i in range(V) if i not in ids[1])
        with pytest.raises(StoreError, match=r"x\.parquet names ids that its source does not"):
            self.compared(block, TopK(ids, block.logits, block.tail_lse))

    def test_beyond_some_positions_a_sample_is_compared(self) -> None:
        """In no step with the sequences' length."""
        block = random_topk(np.random.default_rng(0), 4096, 2, V)
        error = AddedError(V, rows=4 * COMPARED_POSITIONS)
        for _ in range(4 * COMPARED_POSITIONS // 4096):
            error.add(block, block, "x")
        assert COMPARED_POSITIONS <= error.as_dict()["positions_compared"] < 1.1 * COMPARED_POSITIONS
        sparse, one = AddedError(V, rows=64 * COMPARED_POSITIONS), block[:64]
        compared = []
        for _ in range(100):
            sparse.add(one, one, "x")
            compared.append(sparse.as_dict()["positions_compared"])
        assert len(set(np.diff(compared))) > 3, "a sample at a fixed stride would take one of each 64 rows"
