"""torch.compile: the same numbers but for rounding, the same names, refused where it cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student import compiled
from stillroom.pipeline.student.collate import collate
from stillroom.pipeline.student.compiled import compile_body
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.forward import hidden_at
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream
from tests.student.test_session import go, losses
from tests.student.world import World
from tests.tiny import tiny_model

BASE: dict[str, Any] = {"name": "s", "model": {"cut": {"layers": 2}}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductors_kernels_give_the_same_gradients(world: World, tmp_path: Path) -> None:
    """Packed, so that isolation is compiled as well. Needs a C++ compiler."""
    manifest, snapshot = Manifest.open(world.manifest), Snapshot.read(world.snapshot)
    pack = next(iter(Stream(manifest=manifest, snapshot=snapshot, window=48, epochs=1)))
    batch = collate([pack], packing=True, temperature=1.0, vocabulary=world.vocabulary)
    found = []
    for compiles in (False, True):
        model = tiny_model(tmp_path, vocabulary=world.vocabulary, layers=1).train()
        if compiles:
            assert compile_body(model, batch, packing=True).startswith("body compiled by inductor: off by ")
        hidden_MD = hidden_at(model, batch)
        (hidden_MD * torch.randn(hidden_MD.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        if gradient is not None:
            assert (gradient - found[1][name]).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_is_the_plain_one_but_for_rounding(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through dynamo and autograd's tracer, without the kernels, which take minutes here."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    go(world.job(tmp_path / "plain", steps=3))
    go(world.job(tmp_path / "compiled", steps=3, compile=True))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    plain, kept = (
        load_file(tmp_path / name / "checkpoints" / "step-00000003" / "model.safetensors")
        for name in ("plain", "compiled")
    )
    assert plain.keys() == kept.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "compiled" / "export")


@pytest.mark.parametrize("fault", ["fails", "differs"])
def test_what_cannot_be_compiled_is_said_in_one_line(
    fault: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path, vocabulary=world.vocabulary)

    def compile_(**named: Any) -> None:
        if fault == "fails":
            raise RuntimeError("no compiler\nand more")
        with torch.no_grad():
            model.model.norm.weight.mul_(1.01)

    monkeypatch.setattr(model.get_decoder(), "compile", compile_)
    pack = next(iter(Stream(manifest=Manifest.open(world.manifest), snapshot=None, window=48, epochs=1)))
    batch = collate([pack], packing=True, temperature=1.0, vocabulary=world.vocabulary)
    says = {"fails": r"RuntimeError: no compiler\); set compile to false", "differs": r"off by 1\.0e-02 of the largest"}
    with pytest.raises(StudentError, match=says[fault]) as caught:
        compile_body(model, batch, packing=True)
    assert "\n" not in str(caught.value)


def test_features_and_compile_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="compile with features: layers that are compiled together"):
        StudentConfig.model_validate(BASE | {"compile": True, "features": {"hidden": {}}})
    plain = StudentConfig.model_validate(BASE)
    assert plain.digest == StudentConfig.model_validate(BASE | {"compile": True}).digest
