"""`stillroom plan`: a table of what a store could keep, and the cheapest that serves the recipe's students."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.cli import main
from stillroom.storage.fidelity.measure import TEMPERATURES
from tests.e2e.runs import Setup, sentences

DOCUMENTS = sentences(71, 40)


@pytest.fixture(scope="module", name="setup")
def _setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup.make(
        tmp_path_factory.mktemp("pilot"),
        DOCUMENTS,
        fidelity={"positions": 16, "max_gradient_angle_deg": 85, "max_kl_added": None},
    )


@pytest.fixture(name="plan")
def _plan(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(setup: Setup, *words: str, code: int = 0) -> dict[str, Any]:
        assert main(["plan", str(setup.folder / "recipe.yaml"), "--json", *words]) == code
        found: dict[str, Any] = json.loads(capfd.readouterr().out)
        return found if code else dict(found["estimate"])

    return run


def test_every_tier_and_temperature_is_priced_and_nothing_is_founded(setup: Setup, plan: Any) -> None:
    found = plan(setup)
    kept = {row["keeps"] for row in found["options"]}
    assert found["recipe_keeps"] == "top-8 (1/8 nat)"
    assert {f"top-{k} (1/8 nat)" for k in (8, 16, 32, 64, 128, 256)} <= kept
    assert {"top-64 (1/8 nat, packed)", "50 draws", "hidden int16 (32)"} <= kept
    assert {f"top-64 (1/8 nat) + hidden {dtype} (32)" for dtype in ("int16", "int8", "bfloat16")} <= kept
    assert {f"top-8 ({step} nat)" for step in ("1/2", "1/4", "1/8", "1/16")} <= kept
    assert "top-8 (1/8 nat, nucleus 0.95)" in kept
    for name in kept:
        rows = [row for row in found["options"] if row["keeps"] == name]
        temperatures = [1.0] if "draws" in name else list(TEMPERATURES)
        assert [row["temperature"] for row in rows] == temperatures
        assert len({row["bytes_per_token"] for row in rows}) == 1
        assert all(row["corpus_bytes"] > 0 for row in rows)
    also = [row["keeps"] for row in found["also"]]
    assert any("all 2 hidden layers" in name for name in also)
    assert any("one layer's attention, 4 heads" in name for name in also)
    assert all(row["bytes_per_token"] > 0 for row in found["also"])
    assert not (setup.folder / "store").exists()
    assert not (setup.folder / "run" / "ledger.jsonl").exists()


@pytest.mark.slow
def test_the_cheapest_follows_bound_and_temperatures(setup: Setup, plan: Any) -> None:
    loose = plan(setup)
    assert loose["student_temperatures"] == "2"
    strict = plan(setup, "fidelity.max_gradient_angle_deg=5")
    assert "hidden" in strict["cheapest"]
    assert "hidden" not in loose["cheapest"]
    assert strict["cheapest_bytes_per_token"] > loose["cheapest_bytes_per_token"]
    assert "over fidelity.max_gradient_angle_deg = 5" in strict["recipe_misses"]
    for found, bound in ((loose, 85), (strict, 5)):
        fit = [r for r in found["options"] if r["temperature"] == 2 and r["gradient_angle_deg"] <= bound]
        assert found["cheapest_bytes_per_token"] == min(r["bytes_per_token"] for r in fit)
    one = plan(setup, "students.0.losses.temperature=1", "fidelity.max_gradient_angle_deg=null")
    assert one["student_temperatures"] == "1"
    assert one["recipe_misses"] == "nothing"
    none = plan(setup, "fidelity.max_gradient_angle_deg=0.0001")
    assert none["cheapest"] is None


def test_the_bound_on_rounding_picks_the_step(setup: Setup, plan: Any) -> None:
    """The coarsest that meets it, at the recipe's k and in what is recommended."""
    found = plan(setup, "fidelity.max_kl_added=1", "fidelity.max_gradient_angle_deg=null")
    added = {r["keeps"]: r["kl_added"] for r in found["options"] if r["temperature"] == 2}
    assert found["coarsest_gap_step"].startswith("1/2 of 1/2, 1/4, 1/8, 1/16: at k = 8 it adds ")
    assert "1/2 nat" in found["cheapest"] or "topk" not in found["cheapest"]
    bound = added["top-8 (1/4 nat)"] * 1.1
    found = plan(setup, f"fidelity.max_kl_added={bound:g}", "fidelity.max_gradient_angle_deg=null")
    assert found["coarsest_gap_step"].startswith("1/4 of ")
    assert "1/4 nat" in found["cheapest"]
    assert {
        r["within_bound"] for r in found["options"] if r["keeps"] == "top-8 (1/2 nat)" and r["temperature"] == 2
    } == {False}


def test_its_price_is_that_of_the_store(tmp_path: Path, plan: Any) -> None:
    """Both count all columns and footers; the pilot is one shard of the whole corpus here."""
    from stillroom.storage.store import open_store
    from tests.e2e.runs import distil

    setup = Setup.make(tmp_path, DOCUMENTS[:30], store__unit_tokens=2048)
    said = plan(setup)
    distil(setup)
    refs = open_store(str(tmp_path / "store")).committed().values()
    assert sum(ref.size_bytes for ref in refs) == pytest.approx(said["bytes"], rel=0.1)


@pytest.mark.parametrize("heads", ["mean", "per_head"])
def test_layers_and_maps_are_priced_as_a_store_has_them(tmp_path: Path, plan: Any, heads: str) -> None:
    """Within a tenth: a few layers and sequences stand for all. The recipe that asks runs with attention that has no
    maps, the store's with one that has."""
    from stillroom.storage.catalog.inspect import inspect_store
    from tests.e2e.runs import distil

    setup = Setup.make(tmp_path, DOCUMENTS, teacher={"layers": 4}, store__unit_tokens=2048)
    said = {row["keeps"]: row["bytes_per_token"] for row in plan(setup)["also"]}
    maps = f"signal.attention={{every: 1, heads: {heads}}}"
    distil(setup, "signal.layers={every: 1}", maps, "teacher.attention=eager")
    sizes = inspect_store(str(tmp_path / "store"))["columns_bytes_per_token"]
    layers = [size for name, size in sizes.items() if name.startswith("layer_")]
    attention = [size for name, size in sizes.items() if name.startswith("attention_")]
    assert said["one hidden layer, bfloat16"] == pytest.approx(sum(layers) / 4, rel=0.1)
    assert said["every fourth of 4 hidden layers, bfloat16"] == pytest.approx(sizes["layer_4"], rel=0.1)
    assert said["all 4 hidden layers, bfloat16"] == pytest.approx(sum(layers), rel=0.1)
    name = {"mean": "mean of heads", "per_head": "4 heads"}[heads]
    assert said[f"one layer's attention, {name}, uint8"] == pytest.approx(sum(attention) / 4, rel=0.1)


def test_for_people_it_is_a_table(setup: Setup, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(setup.folder / "recipe.yaml"), "--quiet"]) == 0
    shown = capfd.readouterr().out
    assert "cheapest" in shown
    assert "options" in shown


@pytest.mark.parametrize(("hidden", "code"), [(None, 0), ({"dtype": "int16"}, 1)])
def test_a_teacher_without_a_storable_head(
    tmp_path: Path, plan: Any, monkeypatch: pytest.MonkeyPatch, hidden: Any, code: int
) -> None:
    """Hidden states are left out of the table; asked for, they are refused as teaching would refuse them."""
    from stillroom.storage.errors import TeacherError
    from stillroom.workers.torch_teacher import TorchTeacher

    def refuse(self: TorchTeacher) -> Any:
        raise TeacherError("no output head that can be stored")

    monkeypatch.setattr(TorchTeacher, "output_head", refuse)
    setup = Setup.make(tmp_path, DOCUMENTS[:12], signal={"topk": {"k": 8}, "hidden": hidden})
    found = plan(setup, code=code)
    if code:
        assert found["kind"] == "TeacherError"
        return
    assert found["head_bytes"] is None
    assert any("hidden layer, bfloat16" in row["keeps"] for row in found["also"]), "they need no head"
    assert not any("hidden" in row["keeps"] for row in found["options"])
