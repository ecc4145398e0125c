"""Models that are not whole on one device: quantised weights, and blocks in several places."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from stillroom.storage.errors import TeacherError
from stillroom.storage.identity import Identity
from stillroom.storage.records import Sequence, Signal, SignalSpec, TopKSpec
from stillroom.workers import loading
from stillroom.workers.digests import identity_parts
from stillroom.workers.source import load_tokenizer
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.tiny import tiny_teacher

SIGNAL = SignalSpec(TopKSpec(16, None))
QUANTISED = Path(sys.executable).parent.parent / "quantised"

SCORE = """
import sys, warnings
warnings.simplefilter("ignore")  # torchao's own
import numpy as np
from stillroom.storage.identity import Identity
from stillroom.storage.records import Sequence, SignalSpec, TopKSpec
from stillroom.workers.head import output_head
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from pathlib import Path

folder, kind, out = sys.argv[1:]
teacher = TorchTeacher(TeacherSpec(folder=Path(folder), device="cpu", threads=1, quantisation=kind))
ids = np.arange(60, dtype=np.int32)
signal = teacher.score([Sequence(ids)], signal=SignalSpec(TopKSpec(16, None)))[0]
kinds = {type(m.weight).__name__ for n, m in teacher._model.model.named_modules() if n.endswith("proj")}
np.savez(out, ids=signal.topk.ids, logits=signal.topk.logits, kinds=sorted(kinds),
         head=teacher.output_head().weight.float().numpy(), quantisation=teacher.identity_parts()["quantisation"],
         torchao=teacher.provenance([])["torchao"])
"""


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("loading") / "teacher", head_dim=16)


def spec(folder: Path, **options: Any) -> TeacherSpec:
    return TeacherSpec(folder=folder, device="cpu", threads=1, **options)


def scored(teacher: TorchTeacher) -> Signal:
    return teacher.score([Sequence(np.arange(60, dtype=np.int32))], signal=SIGNAL)[0]


@pytest.mark.real
@pytest.mark.parametrize(("kind", "weights", "near"), [("int8", "Int8Tensor", 0.05), ("fp8", "Float8Tensor", 0.3)])
def test_quantised_weights_are_another_teacher_and_near_the_whole_one(
    folder: Path, tmp_path: Path, kind: str, weights: str, near: float
) -> None:
    out = tmp_path / "out.npz"
    environment = os.environ | {"PYTHONPATH": str(QUANTISED)}
    command = [sys.executable, "-c", SCORE, str(folder), kind, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    got = np.load(out)
    assert list(got["kinds"]) == [weights], "every projection of every block"
    assert str(got["quantisation"]) == f"torchao-{kind}"
    assert str(got["torchao"])
    whole = TorchTeacher(spec(folder))
    assert np.array_equal(got["head"], whole.output_head().weight.float().numpy()), "the head stays whole"
    want = scored(whole).topk
    assert want is not None
    off = np.abs(got["logits"] - want.logits)
    assert 0 < off.max() < near
    tokenizer = load_tokenizer(folder).backend_tokenizer.to_str()
    parts = [
        identity_parts(folder, tokenizer, dtype="float32", quantisation=q, cache_dir=tmp_path) for q in (None, kind)
    ]
    ids = {Identity(teacher="tiny", signal=SIGNAL, **part).id for part in parts}
    assert len(ids) == 2


def test_without_torchao_the_extra_is_named(folder: Path) -> None:
    with pytest.raises(TeacherError, match=r"int8 needs torchao, which is not installed: pip install stillroom\[quan"):
        TorchTeacher(spec(folder, quantisation="int8"))
    with pytest.raises(TeacherError, match="int4 has kernels for GPUs only: use int8 or fp8 here"):
        TorchTeacher(spec(folder, quantisation="int4"))


def test_weights_that_are_quantised_already_are_not_quantised_again(folder: Path, tmp_path: Path) -> None:
    held = tiny_teacher(tmp_path / "held")
    config = json.loads((held / "config.json").read_text())
    (held / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    tokenizer = load_tokenizer(held).backend_tokenizer.to_str()
    with pytest.raises(TeacherError, match=r"quantised already \(fp8\): leave it out"):
        identity_parts(held, tokenizer, dtype="float32", quantisation="int8", cache_dir=tmp_path)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_blocks_in_several_places_give_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    """One block waits on disk: accelerate's hooks move it and its inputs; between GPUs they move inputs alone."""
    folder = tiny_teacher(tmp_path / arch, arch=arch)
    want = scored(TorchTeacher(spec(folder))).topk
    base = "transformer" if arch == "gpt2" else "model"
    blocks = "h" if arch == "gpt2" else "layers"
    parts = {"gpt2": ["wte", "wpe", "ln_f"]}.get(arch, ["embed_tokens", "norm", "rotary_emb"])
    places = {f"{base}.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    places |= {f"{base}.{blocks}.0": "cpu", f"{base}.{blocks}.1": "disk"}
    monkeypatch.setattr(loading, "device_map", lambda _: places)
    teacher = TorchTeacher(spec(folder, split="layers"))
    assert "disk" in teacher._model.model.hf_device_map.values()  # type: ignore[union-attr]
    got = scored(teacher).topk
    assert got is not None
    assert want is not None
    assert np.array_equal(got.ids, want.ids)
    assert np.array_equal(got.logits, want.logits)
    assert teacher.provenance([])["split"] == "layers"


def test_what_finds_no_room_on_the_gpus_is_refused() -> None:
    class Model:
        hf_device_map: ClassVar = {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": "cpu"}

    with pytest.raises(TeacherError, match=r"1 of 3 parts do not fit on the \d+ GPUs of this actor, e.g. model.la"):
        loading._require_on_gpus(TeacherSpec(folder=Path("t")), Model(), torch.device("cuda"))
    loading._require_on_gpus(TeacherSpec(folder=Path("t")), Model(), torch.device("cpu"))
