"""The planner's table: what each choice keeps, that its price is that of a real shard, and which one is named."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.pipeline.options import (
    KEPT,
    STEPS,
    Option,
    Pilot,
    candidates,
    cheapest,
    coarsest,
    cut,
    most,
    price,
    price_all,
    step_of,
    stepped,
    unit_of,
)
from stillroom.storage.calibration import head_path
from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.fidelity.bound import Bound
from stillroom.storage.fidelity.measure import TEMPERATURES, Measured
from stillroom.storage.fidelity.sample import choose
from stillroom.storage.files import sha256_hex
from stillroom.storage.identity import Identity
from stillroom.storage.records import (
    HiddenSpec,
    NucleusSpec,
    SampledSpec,
    Sequence,
    Signal,
    SignalSpec,
    TopKSpec,
)
from stillroom.workers.head import calibrate, head_bytes, steps_of
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.tiny import tiny_teacher

RECIPE = SignalSpec(TopKSpec(24, 1 / 16))


def measured(tier: str, temperature: float, angle: float, kl: float | None = 0.0) -> Measured:
    return Measured(tier, temperature, 16, 0.9, 0.1, kl, kl, angle, 1.0)


def option(size: float, *angles: float, kl: float | None = 0.0) -> Option:
    """At T = 1, 2, 4, 8, as many as are given."""
    rows = tuple(measured("topk", t, a, kl) for t, a in zip(TEMPERATURES, angles, strict=False))
    return Option(SignalSpec(TopKSpec(int(size))), size, rows)


class TestCandidates:
    @pytest.mark.parametrize(
        "asked",
        [
            RECIPE,
            SignalSpec(TopKSpec(64, None, NucleusSpec(0.9))),
            SignalSpec(sampled=SampledSpec(12)),
            SignalSpec(hidden=HiddenSpec(32, "int8")),
        ],
    )
    def test_the_recipes_own_is_first_and_each_is_there_once(self, asked: SignalSpec) -> None:
        found = candidates(asked, vocabulary=49152, width=32, hidden=True)
        assert found[0] == asked
        assert len(set(found)) == len(found)
        plain = {s.topk.k for s in found if s.topk and s == SignalSpec(TopKSpec(s.topk.k, s.topk.gap_step))}
        assert plain >= set(KEPT)
        assert {s.hidden.dtype for s in found if s.hidden} == {"int16", "int8", "bfloat16"}
        assert any(s.topk and s.topk.layout == "packed" for s in found)
        assert any(s.sampled for s in found)

    def test_steps_and_a_nucleus_are_tried_at_the_recipes_k(self) -> None:
        found = candidates(RECIPE, vocabulary=49152, width=32, hidden=False)
        tried = {s.topk.gap_step for s in found if s.topk and s.topk.k == 24 and s.topk.layout == "plain"}
        assert tried == {1 / 2, 1 / 4, 1 / 8, 1 / 16}
        assert [s.topk.k for s in found if s.topk and s.topk.nucleus] == [24]
        asked = SignalSpec(TopKSpec(24, 1 / 8, NucleusSpec(0.7, 2.0)))
        found = candidates(asked, vocabulary=49152, width=32, hidden=False)
        assert [s for s in found if s.topk and s.topk.nucleus] == [asked]

    @given(st.integers(3, 300), st.booleans())
    def test_none_exceeds_a_small_vocabulary_and_all_can_be_scored_at_once(self, vocabulary: int, hidden: bool) -> None:
        found = candidates(SignalSpec(TopKSpec(2)), vocabulary=vocabulary, width=8, hidden=hidden)
        assert all(s.topk.k < vocabulary for s in found if s.topk)
        assert hidden == any(s.hidden for s in found)
        whole = most(found, vocabulary=vocabulary)
        assert whole.topk is not None
        assert whole.topk.k == max(s.topk.k for s in found if s.topk)
        assert whole.topk.gap_step is None
        assert (whole.hidden is not None) == hidden


class TestCheapest:
    def test_it_meets_every_temperature_of_the_students(self) -> None:
        table = [option(10, 1, 20, 60, 80), option(20, 1, 9, 25, 70), option(40, 1, 3, 9, 28)]
        bound = Bound(max_gradient_angle_deg=30)
        for wanted, size in (([1.0], 10), ([2.0], 10), ([4.0], 20), ([1.0, 4.0], 20), ([8.0], 40)):
            best = cheapest(table, bound, wanted)
            assert best is not None
            assert best.bytes_per_token == size
        assert cheapest(table, Bound(max_gradient_angle_deg=10), [8.0]) is None
        # Looser, and the smaller will do.
        best = cheapest(table, Bound(max_gradient_angle_deg=75), [4.0])
        assert best is table[0]

    def test_what_was_not_measured_does_not_serve(self) -> None:
        draws = option(5, 1.0)
        assert draws.misses(Bound(), [2.0]) == ["at T = 2 not served"]
        assert draws.misses(Bound(), [1.0]) == []
        assert cheapest([draws, option(50, 1, 1)], Bound(), [1.0, 2.0]) == option(50, 1, 1)

    def test_either_number_can_miss(self) -> None:
        coarse = option(5, 50, kl=0.1)
        assert coarse.misses(Bound(30, 1e-3), [1.0])[0].count(", over ") == 2
        assert coarse.misses(Bound(None, None), [1.0]) == []


class TestCoarsest:
    def steps(self, k: int = 24) -> list[Option]:
        """Rounding to a step adds about its square: 1.6e-2, 4e-3, 1e-3 and 2.5e-4 nats at T = 1, less above."""
        return [
            Option(
                SignalSpec(TopKSpec(k, step)), 40 - 20 * step,
                (measured("topk", 1.0, 50, step**2 / 16), measured("topk", 2.0, 50, step**2 / 64)),
            )
            for step in STEPS
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("most", "temperatures", "expected"),
        [
            (1e-3, [1.0], 1 / 8),
            (4e-3, [1.0], 1 / 4),
            (1e-3, [2.0], 1 / 4),
            (1e-3, [1.0, 2.0], 1 / 8),
            (1.0, [1.0], 1 / 2),
        ],
    )
    def test_the_bound_picks_the_step(self, most: float, temperatures: list[float], expected: float) -> None:
        """Whatever the angle: it follows from k."""
        found = coarsest(self.steps(), 24, Bound(30, most), temperatures)
        assert found is not None
        assert step_of(found) == expected
        best = cheapest(self.steps(), Bound(None, most), temperatures)
        assert best == found, "it is also the cheapest of that k"

    def test_there_may_be_none(self) -> None:
        assert coarsest(self.steps(), 24, Bound(30, 1e-6), [1.0]) is None
        assert coarsest(self.steps(), 24, Bound(30, None), [1.0]) is None
        assert coarsest(self.steps(k=64), 24, Bound(30, 1e-3), [1.0]) is None

    def test_another_choice_takes_the_step_over(self) -> None:
        hidden = HiddenSpec(32, "int16")
        for step, expected in ((1 / 8, 1 / 4), (1 / 2, 1 / 2), (None, 1 / 4)):
            assert stepped(SignalSpec(TopKSpec(64, step), hidden=hidden), 1 / 4) == [
                SignalSpec(TopKSpec(64, expected), hidden=hidden),
                SignalSpec(TopKSpec(64, expected, layout="packed"), hidden=hidden),
            ]
        assert stepped(SignalSpec(sampled=SampledSpec(9)), 1 / 4) == []


@pytest.fixture(scope="module", name="pilot")
def _pilot(tmp_path_factory: pytest.TempPathFactory) -> Pilot:
    """Twelve sequences of a tiny real teacher, scored with all that any choice below needs."""
    folder = tiny_teacher(tmp_path_factory.mktemp("options") / "teacher")
    teacher = TorchTeacher(TeacherSpec(folder=folder, device="cpu"))
    draw = np.random.default_rng(3)
    sequences = [Sequence(draw.integers(3, teacher.vocabulary, 40).astype(np.int32)) for _ in range(12)]
    positions = choose([unit_of(sequences)], wanted=24)
    wanted = SignalSpec(TopKSpec(64, None), SampledSpec(20), HiddenSpec(32, "bfloat16"))
    scored = teacher.score_with_truth(sequences, signal=wanted, positions=positions)
    head = teacher.output_head()
    hidden = np.concatenate([s.hidden for s in scored.signals if s.hidden is not None])
    data = head_bytes(head)
    identity = Identity(teacher="tiny", signal=RECIPE, **teacher.identity_parts())
    calibrations = {"int16": steps_of(head), "int8": calibrate(hidden, head.weight.float().numpy())}
    return Pilot(
        identity, sequences, scored.signals, scored.truth, positions, (head_path(sha256_hex(data)), data), calibrations
    )


class TestPrice:
    def test_more_ids_cost_more_and_are_more_faithful(self, pilot: Pilot) -> None:
        few, many = (price(pilot, SignalSpec(TopKSpec(k)), [1.0, 2.0]) for k in (4, 64))
        assert few.bytes_per_token < many.bytes_per_token
        for a, b in zip(few.rows, many.rows, strict=True):
            assert a.temperature == b.temperature
            assert a.gradient_angle_deg > b.gradient_angle_deg
            assert a.retained_mass < b.retained_mass
            assert a.positions == 24

    def test_coarser_steps_cost_less_and_add_more(self, pilot: Pilot) -> None:
        specs = [SignalSpec(TopKSpec(24, step)) for step in STEPS]
        found = price_all(pilot, specs, [1.0])
        added = [option.rows[0].kl_added_nats or 0.0 for option in found]
        sizes = [option.bytes_per_token for option in found]
        assert sizes == sorted(sizes)
        assert added == sorted(added, reverse=True)
        for number, step in enumerate(STEPS):
            best = coarsest(found, 24, Bound(None, added[number] * 1.01), [1.0])
            assert best is not None
            assert step_of(best) == step

    def test_what_is_priced_together_is_what_is_priced_alone(self, pilot: Pilot) -> None:
        specs = [SignalSpec(TopKSpec(k, layout=layout)) for k in (4, 32) for layout in ("plain", "packed")]
        told: list[int] = []
        together = price_all(pilot, specs, [1.0, 4.0], lambda: told.append(1))
        assert len(told) == len(specs)
        for spec, option in zip(specs, together, strict=True):
            alone = price(pilot, spec, [1.0, 4.0])
            assert (option.spec, option.bytes_per_token) == (alone.spec, alone.bytes_per_token)
            for one, other in zip(option.rows, alone.rows, strict=True):
                assert one.temperature == other.temperature
                assert one.gradient_angle_deg == pytest.approx(other.gradient_angle_deg, rel=1e-9)

    def test_the_packed_layout_is_smaller_and_says_the_same(self, pilot: Pilot) -> None:
        plain, packed = (price(pilot, SignalSpec(TopKSpec(32, layout=a)), [1.0]) for a in ("plain", "packed"))
        assert packed.bytes_per_token < plain.bytes_per_token
        # Ids of equal gaps come in another order, and so do the terms of a sum.
        for field in fields(Measured):
            expected = getattr(plain.rows[0], field.name)
            wanted = expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-9)
            assert getattr(packed.rows[0], field.name) == wanted

    @pytest.mark.parametrize("dtype", ["int16", "int8", "bfloat16"])
    def test_hidden_states_serve_every_temperature(self, pilot: Pilot, dtype: str) -> None:
        alone = price(pilot, SignalSpec(hidden=HiddenSpec(32, dtype)), TEMPERATURES)  # type: ignore[arg-type]
        assert [row.temperature for row in alone.rows] == list(TEMPERATURES)
        assert {row.tier for row in alone.rows} == {"hidden"}
        assert max(row.gradient_angle_deg for row in alone.rows) < 5

    def test_draws_serve_one(self, pilot: Pilot) -> None:
        drawn = price(pilot, SignalSpec(sampled=SampledSpec(20)), TEMPERATURES)
        assert [(row.tier, row.temperature) for row in drawn.rows] == [("sampled", 1.0)]

    def test_the_part_that_would_teach_is_the_one_measured(self, pilot: Pilot) -> None:
        spec = SignalSpec(TopKSpec(8), SampledSpec(20), HiddenSpec(32, "bfloat16"))
        assert {row.tier for row in price(pilot, spec, [1.0]).rows} == {"hidden"}


def test_a_nucleus_is_cut_as_a_teacher_cuts_it(pilot: Pilot, tmp_path: Path) -> None:
    spec = SignalSpec(TopKSpec(32, None, NucleusSpec(0.2)))
    whole = Signal.concatenate(pilot.signals)
    found = cut(whole, spec, pilot.identity.vocabulary).topk
    assert found is not None
    assert found.counts is not None
    assert whole.topk is not None
    tail = tail_lse_at(whole.topk.tail_lse, 1.0, pilot.identity.vocabulary - 64)
    total = np.logaddexp(np.logaddexp.reduce(whole.topk.logits, axis=1), tail)
    mass = np.exp(whole.topk.logits - total[:, None]).cumsum(axis=1)
    expected = np.minimum((mass < 0.2).sum(axis=1) + 1, 32)
    assert abs(found.counts - expected).max() <= 1
    assert (found.counts == expected).mean() > 0.99
