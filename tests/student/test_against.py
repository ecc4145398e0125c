"""A model folder on held-out documents of stores."""

import pytest

from stillroom.pipeline.student.against import against
from tests.student.world import World


def test_with_a_teacher_and_by_the_text_alone(world: World) -> None:
    manifest, snapshot = str(world.manifest), str(world.snapshot)
    on = [{"manifest": manifest, "snapshot": snapshot}, {"manifest": manifest, "snapshot": None}]
    taught, text = against({"folder": str(world.teacher), "device": "cpu", "on": on})
    assert taught["kl"] == pytest.approx(0.0, abs=1e-5), "the teacher itself"
    assert taught["top1"] == 1.0
    assert (text["kl"], text["top1"], text["teacher_mass"]) == (None, None, None)
    assert (text["tokens"], text["perplexity"]) == (taught["tokens"], taught["perplexity"])
