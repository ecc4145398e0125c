"""Whole runs that learn from inside the teacher: they learn, they resume bit-equal, they export the student alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.curriculum import stages
from stillroom.pipeline.student.session import Session
from stillroom.pipeline.student.signals import Stop
from stillroom.storage.errors import StudentError, UnsupportedSignal
from stillroom.storage.manifest import Manifest, ManifestRow
from stillroom.storage.manifest_writer import ManifestWriter
from stillroom.storage.records import AttentionSpec, HiddenSpec, LayersSpec, Sequence, SignalSpec, TopKSpec
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream
from tests.student.features.world import build_inner_world
from tests.student.test_session import go, log_of
from tests.student.world import World, cut_after
from tests.tiny import tiny_teacher

ALL: dict[str, Any] = {
    "hidden": {"weight": 0.3, "projection": "linear", "map": "uniform"},
    "attention": {"weight": 0.2, "heads": "per_head"},
    "embeddings": {"weight": 0.1, "loss": "cosine"},
    "relations": {"weight": 0.5, "map": "last"},
}


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in log_of(run_dir) if record["kind"] == "step"]


def narrow(folder: Path) -> Path:
    """A student of its own: 16 channels, 2 heads, 2 layers, the teacher's tokenizer."""
    return tiny_teacher(folder, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, layers=2, seed=3)


def test_every_feature_loss_falls_and_is_logged(inner: World, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "steps": 60,
        "batch_packs": 4,
        "lr": 3e-3,
        "checkpoint_every": 60,
        "losses": {"alpha": 1},
    }
    result = go(inner.job(tmp_path, features=ALL, **settings))
    records = steps_of(tmp_path)
    assert all(set(record["features"]) == set(ALL) for record in records)
    first, last = records[0], records[-1]
    assert first["features"]["embeddings"] < 1e-6, "a cut begins with its teacher's"
    for name in ALL.keys() - {"embeddings"}:
        assert last["features"][name] < 0.9 * first["features"][name], name
    assert result["after"]["kl"] < result["before"]["kl"]
    for record in records:
        parts = sum(record["weights"][name] * value for name, value in record["features"].items())
        assert record["loss"] == pytest.approx(record["kd"] + parts, rel=1e-5)


def test_a_narrow_student_learns_through_matrices(inner: World, tmp_path: Path) -> None:
    features = {
        "hidden": {"weight": 0.5}, "attention": {"weight": 0.2, "map": [[0, 1], [1, 3]]}, "embeddings": {"weight": 0.1},
        "relations": {"weight": 0.5, "map": [[1, 2], [2, 4]]},
    }  # fmt: skip
    student: dict[str, Any] = {"model": {"from": str(narrow(tmp_path / "student"))}, "features": features, "lr": 3e-3}
    go(inner.job(tmp_path / "run", steps=80, checkpoint_every=80, **student))
    records = steps_of(tmp_path / "run")
    for name in features:
        assert records[-1]["features"][name] < 0.9 * records[0]["features"][name], name
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-00000080" / "model.safetensors")
    matrices = {name: tensor for name, tensor in kept.items() if name.startswith("features.")}
    assert {tuple(m.shape) for m in matrices.values()} == {(32, 16)}
    assert len(matrices) == 3, "two pairs of hidden states, and the embeddings"
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert not any("features" in name for name in exported)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert model.config._attn_implementation == "sdpa", "what the losses need stays with the training"


CURRICULUM: dict[str, Any] = {
    "phases": [
        {"steps": 2},
        {"steps": 3, "features": {"hidden": {"weight": {"from": 0.1, "to": 0.4}}, "attention": {}, "relations": {}}},
        {"steps": 3, "temperature": {"from": 2, "to": 1}, "features": {"hidden": {"weight": 0.1}}, "lr": 1e-3},
        {"steps": 2, "losses": {"alpha": 0}, "features": "none", "lr": 5e-4},
    ]
}


@pytest.mark.parametrize("features", [{"features": ALL, "steps": 8}, CURRICULUM], ids=["one phase", "curriculum"])
def test_a_run_cut_off_in_any_phase_goes_on_bit_equal(features: dict[str, Any], inner: World, tmp_path: Path) -> None:
    student = {"model": {"from": str(narrow(tmp_path / "student"))}, "checkpoint_every": 1, "keep_last": 20}
    phases = {**student, **features}
    if "steps" not in features:
        phases["steps"] = None
    else:
        phases["features"] = {**ALL, "attention": {"weight": 0.2}}
    whole = tmp_path / "whole"
    go(inner.job(whole, **phases))
    expected = log_of(whole)
    weights = load_file(whole / "export" / "model.safetensors")
    total = len([r for r in expected if r["kind"] == "step"])
    matrices = load_file(whole / "checkpoints" / f"step-{total:08d}" / "model.safetensors")
    for step in (1, 3, 6, total - 1):
        cut = cut_after(whole, step)
        go(inner.job(cut, **phases))
        assert log_of(cut) == expected
        again = load_file(cut / "export" / "model.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
        kept = load_file(cut / "checkpoints" / f"step-{total:08d}" / "model.safetensors")
        assert kept.keys() == matrices.keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in matrices.items())


def test_each_phase_has_its_own_losses(inner: World, tmp_path: Path) -> None:
    go(inner.job(tmp_path, steps=None, **CURRICULUM))
    records = steps_of(tmp_path)
    assert [r["phase"] for r in records] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [sorted(r["features"]) for r in records] == [
        *[[]] * 2, *[["attention", "hidden", "relations"]] * 3, *[["hidden"]] * 3, *[[]] * 2,
    ]  # fmt: skip
    assert [r["temperature"] for r in records] == [2, 2, 2, 2, 2, 2, 1.5, 1, 2, 2]
    assert [r["alpha"] for r in records] == [0.7] * 8 + [0.0] * 2
    assert [r["weights"].get("hidden") for r in records[2:5]] == pytest.approx([0.1, 0.25, 0.4])
    assert [r["output_weights"] for r in records] == [{"forward_kl": 1.0}] * 8 + [{}] * 2
    assert all(r["kd"] is None and r["ce"] == r["loss"] for r in records[8:])


def test_a_student_that_is_its_teacher_has_nothing_to_learn(inner: World, tmp_path: Path) -> None:
    """Every layer meets its own: a number off by one in any map, capture or target would show."""
    every: dict[str, Any] = {
        "hidden": {"map": "uniform"}, "embeddings": {}, "relations": {"map": "uniform"},
        "attention": {"map": "uniform", "heads": "per_head"},
    }  # fmt: skip
    go(inner.job(tmp_path / "own", steps=1, model={"cut": {"layers": 4}}, features=every))
    assert all(value < 1e-5 for value in steps_of(tmp_path / "own")[0]["features"].values())
    beside = {name: {"map": [[1, 2]]} for name in ("hidden", "relations", "attention")}
    go(inner.job(tmp_path / "beside", steps=1, model={"cut": {"layers": 4}}, features=beside))
    assert all(value > 1e-3 for value in steps_of(tmp_path / "beside")[0]["features"].values())


def test_the_last_state_may_come_from_the_hidden_part(tmp_path: Path) -> None:
    world = build_inner_world(tmp_path / "world", SignalSpec(TopKSpec(8), hidden=HiddenSpec(32, "bfloat16")))
    features = {"hidden": {"map": "last", "loss": "cosine"}, "relations": {"map": "last"}}
    settings: dict[str, Any] = {"steps": 1, "features": features, "losses": {"signal": "topk"}}
    go(world.job(tmp_path / "own", model={"cut": {"layers": 4}}, **settings))
    go(world.job(tmp_path / "short", **settings))
    own, short = (steps_of(tmp_path / name)[0]["features"] for name in ("own", "short"))
    assert all(value < 1e-4 for value in own.values()), "rounded to bfloat16"
    assert all(value > 1e-3 for value in short.values())


@pytest.mark.parametrize("variant", ["rows", "micro", "saving"])
def test_packing_micro_batches_and_checkpointing_change_rounding_only(
    variant: str, inner: World, tmp_path: Path
) -> None:
    """A packed row's maps and relations are those of its sequences: alone in a row they give the same losses."""
    manifest, snapshot = Manifest.open(inner.manifest), Snapshot.read(inner.snapshot)
    features = {**ALL, "relations": {"weight": 0.5, "map": "uniform"}}
    results = []
    for changed in (False, True):
        settings: dict[str, dict[str, Any]] = {
            "rows": {"packing": False},
            "micro": {"micro_packs": 4},
            "saving": {"gradient_checkpointing": True},
        }
        student: dict[str, Any] = {"features": features, "batch_packs": 4, **(settings[variant] if changed else {})}
        job = inner.job(tmp_path / str(changed), **student)
        session = Session(job, manifest, snapshot, Stop(), device=torch.device("cpu"))
        with torch.no_grad():  # else a cut begins with its teacher's first layers
            session.model.model.layers[0].mlp.down_proj.weight.mul_(0.3)
        whole = Stream(manifest=manifest, snapshot=snapshot, window=48, epochs=1, pack=session.config.packing)
        results.append(session.trainer.step(list(whole)[: 4 if variant == "micro" else None], 0))
    assert results[0].trained == results[1].trained
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-4)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-3)
    assert results[0].features == pytest.approx(results[1].features, rel=1e-4, abs=1e-6)


def test_bf16_autocast_takes_feature_losses_in_float32(inner: World, tmp_path: Path) -> None:
    go(inner.job(tmp_path / "exact", steps=2, features=ALL))
    go(inner.job(tmp_path / "bf16", steps=2, features=ALL, precision="bfloat16"))
    exact, rough = (steps_of(tmp_path / name)[0]["features"] for name in ("exact", "bf16"))
    assert exact != rough
    assert exact == pytest.approx(rough, rel=0.05, abs=0.01)


def test_a_store_of_layers_alone_teaches_a_student_of_features(tmp_path: Path) -> None:
    spec = SignalSpec(layers=LayersSpec((0, 2, 4), 32), attention=AttentionSpec((1, 3), 64))
    world = build_inner_world(tmp_path / "world", spec)
    features = {"hidden": {"weight": 1, "map": [[1, 2], [2, 4]]}, "attention": {"weight": 1}}
    result = go(world.job(tmp_path / "run", steps=30, features=features, losses={"alpha": 0}))
    assert result["after"]["kl"] is None
    assert result["after"]["perplexity"] < result["before"]["perplexity"]
    first, *_, last = steps_of(tmp_path / "run")
    assert all(last["features"][name] < first["features"][name] for name in features)
    with pytest.raises(UnsupportedSignal, match="learns from the teacher's output"):
        go(world.job(tmp_path / "other", steps=3, features=features))


def fine_tuning(folder: Path, inner: World, *, words: int = 12, tokenizer: str | None = None) -> Path:
    """The manifest of another text: one sentence over and over."""
    manifest = Manifest.open(inner.manifest)
    ids = np.arange(40, 40 + words, dtype=np.int32)
    path = folder / "other.parquet"
    with ManifestWriter(path) as writer:
        for number in range(8):
            sequence = Sequence(np.concatenate([ids, [50 + number]]).astype(np.int32))
            mask = np.ones(len(sequence.input_ids), dtype=bool)
            writer.append(ManifestRow(sequence, mask, 1.0, number, "other", number + 1, heldout=False))
        writer.commit(replace(manifest.meta, tokenizer=tokenizer or manifest.meta.tokenizer))
    return path


def test_the_last_phase_fine_tunes_on_another_corpus_and_resumes_in_it(inner: World, tmp_path: Path) -> None:
    hard = {"losses": {"alpha": 0}, "features": "none", "corpus": str(fine_tuning(tmp_path, inner))}
    phases: list[dict[str, Any]] = [
        {"steps": 3}, {"steps": 2, **hard}, {"steps": 2}, {"steps": 6, **hard, "lr": 3e-3},
    ]  # fmt: skip
    settings: dict[str, Any] = {
        "steps": None, "phases": phases, "features": ALL, "checkpoint_every": 1, "keep_last": 20, "batch_packs": 1,
    }  # fmt: skip
    whole = tmp_path / "whole"
    go(inner.job(whole, **settings))
    records = steps_of(whole)
    # The corpus is three packs an epoch, and goes on where it was left; so does the run's own.
    other = [(r["epoch"], *r["packs"]) for r in records if r["phase"] in (1, 3)]
    assert other == [(step // 3, step % 3) for step in range(8)]
    own = [(r["epoch"], *r["packs"]) for r in records if r["phase"] in (0, 2)]
    assert own == [(0, step) for step in range(5)]
    assert records[-1]["ce"] < 0.9 * records[7]["ce"]
    for step in (2, 4, 6, 9):
        cut = cut_after(whole, step)
        go(inner.job(cut, **settings))
        assert log_of(cut) == log_of(whole)


def test_a_corpus_that_does_not_go_with_the_runs_own(inner: World, tmp_path: Path) -> None:
    hard: dict[str, Any] = {"steps": 1, "losses": {"alpha": 0}}
    strange: dict[str, Any] = {
        "steps": None,
        "phases": [{**hard, "corpus": str(fine_tuning(tmp_path, inner, tokenizer="0" * 32))}],
    }
    with pytest.raises(StudentError, match="was tokenised by 0000"):
        go(inner.job(tmp_path / "a", **strange))
    long: dict[str, Any] = {"steps": None, "phases": [{**hard, "corpus": str(fine_tuning(tmp_path, inner, words=80))}]}
    with pytest.raises(StudentError, match="sequences of 81 tokens, the student's window is 48"):
        go(inner.job(tmp_path / "b", **long))
    with pytest.raises(ValidationError, match=r"phases\.0\.corpus has no signal"):
        inner.job(tmp_path / "c", steps=None, phases=[{"steps": 1, "corpus": "x"}])


def test_another_corpus_under_the_same_name_is_another_run(inner: World, tmp_path: Path) -> None:
    path = fine_tuning(tmp_path, inner)
    settings: dict[str, Any] = {"steps": None, "phases": [{"steps": 2, "losses": {"alpha": 0}, "corpus": str(path)}]}
    go(inner.job(tmp_path / "run", **settings))
    fine_tuning(tmp_path, inner, words=9)
    with pytest.raises(StudentError, match=r"other\.parquet: \w+ there, \w+ now"):
        go(inner.job(tmp_path / "run", **settings))


def test_another_feature_weight_is_another_run(inner: World, tmp_path: Path) -> None:
    job = inner.job(tmp_path, features={"hidden": {"weight": 0.3}})
    other = inner.job(tmp_path, features={"hidden": {"weight": 0.2}})
    assert job.student.digest != other.student.digest != inner.job(tmp_path).student.digest
    go(job)
    with pytest.raises(StudentError, match="features"):
        go(other)


def test_what_the_store_lacks_is_said_before_training(inner: World, world: World, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSignal, match=r"layers 7, of which the store holds 0, 1, 2, 3, 4"):
        go(inner.job(tmp_path / "a", features={"hidden": {"map": [[1, 7]]}}))
    with pytest.raises(
        UnsupportedSignal, match=r"features.attention needs signal.attention, and the store holds top-16"
    ):
        go(world.job(tmp_path / "b", features={"attention": {}}))
    job = inner.job(
        tmp_path / "c", features={"attention": {"heads": "per_head"}}, model={"from": str(narrow(tmp_path / "student"))}
    )
    with pytest.raises(StudentError, match=r"has 2 heads and the store's maps 4: set it to mean"):
        go(job)
    assert not (tmp_path / "a" / "log.jsonl").exists()


def test_stages_of_a_plain_run(inner: World, tmp_path: Path) -> None:
    (stage,) = stages(inner.job(tmp_path).student, 8)
    assert (stage.first, stage.steps, stage.features) == (0, 8, None)
