"""float16 with a scaled loss: it trains, overflow is counted apart and halves the scale, a fault stops the run."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student import precision
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.precision import FIRST, FLOOR, Scaler, autocast_dtype
from stillroom.pipeline.student.trainer import Trainer
from stillroom.storage.errors import NonFiniteLoss
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Pack
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream
from tests.student.test_session import go, log_of, losses, poisoned
from tests.student.world import World

CPU = torch.device("cpu")
BASE: dict[str, Any] = {"name": "s", "model": {"cut": {"layers": 2}}}


def packs_of(world: World) -> list[Pack]:
    manifest, snapshot = Manifest.open(world.manifest), Snapshot.read(world.snapshot)
    return list(Stream(manifest=manifest, snapshot=snapshot, window=48, epochs=1))[:2]


def half(world: World, **student: Any) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32)
    with torch.no_grad():  # else it is its teacher and has nothing to learn
        model.model.layers[1].mlp.down_proj.weight.mul_(0.3)
    config = world.job(Path("unused"), precision="float16", **student).student
    return Trainer(model, config, vocabulary=world.vocabulary, total_steps=9, device=CPU)


def test_float16_trains_like_float32(world: World, tmp_path: Path) -> None:
    exact = go(world.job(tmp_path / "exact", steps=4))
    result = go(world.job(tmp_path / "half", steps=4, precision="float16"))
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "exact"), rel=0.02)
    assert losses(tmp_path / "half") != losses(tmp_path / "exact")
    assert result["after"]["kl"] == pytest.approx(exact["after"]["kl"], rel=0.02)
    assert (result["skipped_steps"], result["scaler_skipped"]) == (0, 0)
    assert "scaler_skipped" not in exact
    assert {r["scale"] for r in log_of(tmp_path / "half") if r["kind"] == "step"} == {FIRST}
    weights = load_file(tmp_path / "half" / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_gradient_is_that_without_a_scale(world: World) -> None:
    """It is divided out before the gradient is clipped and reported."""
    packs = packs_of(world)
    found = []
    for scale in (1.0, 2.0**12):
        trainer = half(world)
        trainer.scaler.restore({**(trainer.scaler.state() or {}), "scale": scale})
        found.append(trainer.step(packs, 3))
        assert found[-1].scale == scale
    assert found[0].grad_norm == pytest.approx(found[1].grad_norm, rel=1e-2)
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-6)


def test_overflow_halves_the_scale_and_leaves_the_step_out(world: World) -> None:
    packs, trainer = packs_of(world), half(world)
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    before = weight.clone()
    trainer.scaler.restore({**(trainer.scaler.state() or {}), "scale": 2.0**60})
    result = trainer.step(packs, 0)
    assert (result.overflowed, result.skipped, result.grad_norm) == (True, False, None)
    assert result.loss is not None
    assert math.isfinite(result.loss)
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert trainer.scaler.scale == 2.0**59
    steps = 0
    while result.overflowed:
        result = trainer.step(packs, 0)
        steps += 1
    assert 1 < steps < 60
    assert not torch.equal(weight, before)


def test_a_loss_that_is_nan_is_no_overflow(world: World) -> None:
    packs = packs_of(world)
    for on_nan in ("stop", "skip"):
        config = world.job(Path("unused"), precision="float16", on_nan=on_nan).student
        trainer = poisoned(world, config)
        if on_nan == "stop":
            with pytest.raises(NonFiniteLoss, match=r"in float16, its loss scaled by 65536 \(bfloat16 and"):
                trainer.step(packs, 0)
        else:
            result = trainer.step(packs, 0)
            assert (result.skipped, result.overflowed) == (True, False)
        assert trainer.scaler.scale == FIRST, "the scale is not the cause"


def test_gradients_that_overflow_at_the_floor_stop_the_run() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    scaler = Scaler(torch.float16, CPU)
    scaler.restore({**(scaler.state() or {}), "scale": 2 * FLOOR})
    for caused in (True, False):
        scaler.scaled((weight * torch.inf).sum()).backward()
        scaler.unscale(optimizer)
        assert scaler.back_off(1.0) is caused
        assert scaler.scale == FLOOR
        optimizer.zero_grad()


def test_the_scale_doubles_after_many_good_steps_and_one_overflow_starts_the_count_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    scaler, seen = Scaler(torch.float16, CPU), []
    for step in range(8):
        bad = step == 2
        scaler.scaled((weight * (torch.inf if bad else 1.0)).sum()).backward()
        scaler.unscale(optimizer)
        if bad:
            assert scaler.back_off(1.0)
        else:
            scaler.step(optimizer)
        optimizer.zero_grad()
        assert scaler.scale is not None
        seen.append(scaler.scale / FIRST)
    assert seen == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1]


def test_a_run_goes_on_with_its_scale(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows every third step, and overflows at first."""
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    monkeypatch.setattr(precision, "FIRST", 2.0**24)
    settings: dict[str, Any] = {"precision": "float16", "steps": 8, "checkpoint_every": 1, "keep_last": 9}
    result = go(world.job(tmp_path / "whole", **settings))
    assert 0 < result["scaler_skipped"] < 8
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    (cut / "result.json").unlink()
    for step in range(6, 9):
        shutil.rmtree(cut / "checkpoints" / f"step-0000000{step}")
    again = go(world.job(cut, **settings))
    assert log_of(cut) == log_of(tmp_path / "whole")
    assert again["scaler_skipped"] == result["scaler_skipped"]


def test_which_numbers_are_used() -> None:
    assert autocast_dtype("auto", CPU) is False
    assert autocast_dtype("float32", CPU) is False
    assert autocast_dtype("bfloat16", CPU) == torch.bfloat16
    assert autocast_dtype("float16", CPU) == torch.float16
    scaler = Scaler(torch.bfloat16, CPU)
    assert (scaler.enabled, scaler.scale, scaler.state(), scaler.back_off(math.nan)) == (False, None, None, False)


def test_what_was_trained_before_precision_had_its_name_stays_what_it_is() -> None:
    plain = StudentConfig.model_validate(BASE)
    assert plain.numbers()["bf16"] == "auto"
    assert "precision" not in plain.numbers()
    assert plain.digest == "7cccf86689e7e9750ac6b56d4e704c1a"
    stated = {name: StudentConfig.model_validate(BASE | {"precision": name}) for name in ("float32", "bfloat16")}
    assert [stated[name].numbers()["bf16"] for name in stated] == [False, True]


@pytest.mark.parametrize(("old", "new"), [(True, "bfloat16"), (False, "float32"), ("auto", "auto")])
def test_the_old_name_is_answered_with_the_new_one(old: Any, new: str) -> None:
    with pytest.raises(ValidationError, match=f"bf16 is called precision now: write `precision: {new}` in its place"):
        StudentConfig.model_validate(BASE | {"bf16": old})


def test_maps_are_refused_in_float16() -> None:
    with pytest.raises(ValidationError, match=r"features\.attention with precision float16: weights below 6e-8"):
        StudentConfig.model_validate(BASE | {"precision": "float16", "features": {"attention": {}}})
    StudentConfig.model_validate(BASE | {"precision": "float16", "features": {"hidden": {}}})
