"""LoRA: adapters alone train and are kept, the head's loss needs no gradient of its weight, the export is plain."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.student import lora
from stillroom.pipeline.student.config import LoraConfig, StudentConfig
from stillroom.pipeline.student.losses import fused
from stillroom.pipeline.student.session import Session
from stillroom.pipeline.student.signals import Stop
from stillroom.pipeline.student.streams import first
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from tests.student.features.test_runs import ALL
from tests.student.features.world import build_inner_world
from tests.student.test_session import go, log_of, losses
from tests.student.world import World, build_world
from tests.tiny import tiny_model

pytest.importorskip("peft")

LORA: dict[str, Any] = {"lora": {"rank": 4, "dropout": 0.1}, "lr": 2e-2}


def session_of(world: World, folder: Path, **student: Any) -> Session:
    job = world.job(folder, **student)
    return Session(job, Manifest.open(job.manifest), Snapshot.read(world.snapshot), Stop(), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of all-linear adapters with dropout."""
    folder = tmp_path_factory.mktemp("lora")
    settings = LORA | {"steps": 18, "checkpoint_every": 6, "keep_last": 9, "losses": {"alpha": 1}}
    return folder, go(world.job(folder, **settings)) | {"settings": settings}


def test_adapters_learn_and_nothing_else_changes(world: World, trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    assert result["after"]["kl"] < 0.8 * result["before"]["kl"]
    exported, teacher = (
        load_file(folder / "export" / "model.safetensors"),
        load_file(world.teacher / "model.safetensors"),
    )
    assert torch.equal(exported["model.embed_tokens.weight"], teacher["model.embed_tokens.weight"])
    assert torch.equal(exported["model.norm.weight"], teacher["model.norm.weight"])
    assert not torch.equal(exported["model.layers.0.mlp.up_proj.weight"], teacher["model.layers.0.mlp.up_proj.weight"])
    assert not any("lora" in name for name in exported)


def test_checkpoints_hold_the_adapters_alone(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    path = folder / "checkpoints" / "step-00000018"
    kept = load_file(path / "model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in kept)
    assert sum(tensor.numel() for tensor in kept.values()) == result["trained_parameters"]
    # Per layer q, k, v, o: 32→32, 32→16, 32→16, 32→32; gate, up, down: 32→64, 32→64, 64→32.
    assert result["trained_parameters"] == 2 * 4 * (64 + 48 + 48 + 64 + 96 + 96 + 96)
    assert result["parameters"] > 5 * result["trained_parameters"]
    moments = load_file(path / "optimizer.safetensors")
    assert {name.rpartition(":")[0] for name in moments} == kept.keys()


def test_the_export_loads_with_transformers_alone_and_its_adapter_with_peft(
    world: World, trained: tuple[Path, dict[str, Any]]
) -> None:
    from peft import PeftModel

    folder, _ = trained
    merged = AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = torch.randint(0, world.vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    base = session_of(world, folder / "unused").model.eval()  # without adapters: the cut itself
    with torch.no_grad():
        before = base(input_ids=ids).logits
        own = PeftModel.from_pretrained(base, folder / "export" / "adapter").eval()(input_ids=ids).logits
        logits = merged(input_ids=ids).logits
    assert torch.allclose(logits, own, atol=1e-4 * float(own.abs().max()))
    assert not torch.allclose(logits, before, atol=1e-2 * float(before.abs().max()))
    assert "base_model_name_or_path" in json.loads((folder / "export" / "adapter" / "adapter_config.json").read_text())


def test_a_run_with_adapters_goes_on_bit_equal(
    world: World, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Their dropout draws from the same generators as any other."""
    whole, result = trained
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    for step in (12, 18):
        shutil.rmtree(cut / "checkpoints" / f"step-000000{step}")
    go(world.job(cut, **result["settings"]))
    assert log_of(cut) == log_of(whole)
    again, weights = (load_file(folder / "export" / "model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_adapters_start_from_the_seed_alone(world: World, tmp_path: Path) -> None:
    """Whatever the generators were before."""
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        model = session_of(world, tmp_path, seed=seed, **LORA).model
        found.append(dict(model.named_parameters())["model.layers.0.mlp.up_proj.lora_A.default.weight"])
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(noise)), "drawn from the run's"
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_base_that_changed_under_its_adapters_is_refused(world: World, tmp_path: Path) -> None:
    student = tmp_path / "student"
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(student)
    settings = LORA | {"model": {"from": str(student)}, "steps": 1, "checkpoint_every": 1}
    tiny_model(student, vocabulary=world.vocabulary)
    go(world.job(tmp_path / "run", **settings))
    (tmp_path / "run" / "result.json").unlink()
    tiny_model(student, vocabulary=world.vocabulary, seed=1)
    with pytest.raises(StudentError, match=r"base: \w+ there, \w+ now \(the weights under the adapters changed\)"):
        go(world.job(tmp_path / "run", **settings))
    config = json.loads((tmp_path / "run" / "export" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(student)


def test_the_gradient_of_a_frozen_head_is_never_made(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[Any]] = []
    real = fused._Run.sums

    def seen(run: Any) -> Any:
        made.append([None if grad is None else tuple(grad.shape) for grad in run.grads] + [run._sum_VD])
        return real(run)

    monkeypatch.setattr(fused._Run, "sums", seen)
    session = session_of(world, tmp_path, **LORA)
    session.trainer.step([first(session.streams.training())], 0)
    trained = [grads for grads in made if grads[0] is not None]
    assert len(trained) == 1
    assert trained[0][1:] == [None, None, None]
    assert session.trainer.form.startswith("output head and loss: fused")
    assert session.model.lm_head.weight.grad is None


def test_gradient_checkpointing_changes_no_number_of_adapters(world: World, tmp_path: Path) -> None:
    """The embeddings have no gradient: a block's input needs none, and its adapters do."""
    settings = LORA | {"lora": {"rank": 4}, "steps": 4, "signal": False, "losses": {"alpha": 0}}
    go(world.job(tmp_path / "plain", **settings))
    go(world.job(tmp_path / "saving", gradient_checkpointing=True, **settings))
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert losses(tmp_path / "plain")[-1] < losses(tmp_path / "plain")[0]


@pytest.mark.slow
def test_layers_are_learned_from_under_adapters(tmp_path: Path) -> None:
    world = build_inner_world(tmp_path / "world")
    go(world.job(tmp_path / "run", features=ALL, **LORA, steps=30, batch_packs=4, losses={"alpha": 1}))
    records = [r for r in log_of(tmp_path / "run") if r["kind"] == "step"]
    for name in ("hidden", "attention", "relations"):
        assert records[-1]["features"][name] < records[0]["features"][name], name


@pytest.mark.slow
def test_gpt2s_own_linear_layers_are_adapted(tmp_path: Path) -> None:
    """They are Conv1D, their weights transposed."""
    world = build_world(tmp_path / "world", arch="gpt2")
    result = go(world.job(tmp_path / "run", lora={"rank": 4, "targets": ["c_attn"]}, lr=2e-2, steps=2))
    assert result["trained_parameters"] == 2 * 4 * (32 + 96)
    assert result["after"]["kl"] != result["before"]["kl"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_proj", "w_q"], "no linear layer w_q; it has down_proj, gate_proj, k_proj"),
        (["lm_head"], "lm_head is the student's embedding or output head"),
        (["embed_tokens"], "embed_tokens is the student's embedding"),
    ],
)
def test_targets_that_cannot_be_are_refused(targets: list[str], says: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, vocabulary=64)
    with pytest.raises(StudentError, match=says):
        lora.adapt(model, LoraConfig.model_validate({"targets": targets}), seed=0)


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(StudentError, match=r"pip install 'stillroom\[lora\]'"):
        lora.require_peft()


def test_a_student_without_adapters_keeps_its_numbers() -> None:
    base: dict[str, Any] = {"name": "s", "model": {"cut": {"layers": 2}}}
    plain = StudentConfig.model_validate(base)
    assert "lora" not in plain.numbers()
    assert plain.digest != StudentConfig.model_validate(base | {"lora": {}}).digest
    assert LoraConfig().alpha_or_default == 32
