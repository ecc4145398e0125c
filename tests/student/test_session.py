"""Whole runs over a real store: they learn, they repeat, they resume bit-equal, they refuse."""

import json
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.student.__main__ import locked, main
from stillroom.pipeline.student.bindings import bindings_of, finished
from stillroom.pipeline.student.config import StudentJob
from stillroom.pipeline.student.runlog import cut_back
from stillroom.pipeline.student.session import run
from stillroom.pipeline.student.trainer import Trainer, parameter_groups
from stillroom.storage.errors import NonFiniteLoss, RecipeError, StudentError, TokenizerMismatch
from stillroom.storage.manifest import Manifest
from stillroom.storage.manifest_writer import ManifestWriter
from stillroom.storage.records import Pack
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream
from tests.student.world import World, build_world, cut_after
from tests.tiny import tiny_model, tiny_teacher


def go(job: StudentJob) -> dict[str, Any]:
    """Run in this process, as `main` does."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    return run(job, Manifest.open(job.manifest), Snapshot.read(job.snapshot) if job.snapshot else None)


def log_of(run_dir: Path) -> list[dict[str, Any]]:
    """Records without the two that measure time."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in {"tokens_per_s", "data_wait"}} for r in records]


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in log_of(run_dir) if r["kind"] == "step"]


def test_a_student_comes_closer_to_its_teacher_and_is_exported(world: World, tmp_path: Path) -> None:
    """alpha 1: the teacher is random, so the text would pull away from it."""
    result = go(world.job(tmp_path, steps=60, batch_packs=4, checkpoint_every=50, lr=3e-3, losses={"alpha": 1}))
    before, after = result["before"], result["after"]
    assert after["kl"] < 0.5 * before["kl"]
    assert after["top1"] > before["top1"]
    assert result["steps"] == 60
    assert result["trained_positions"] < result["tokens"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "export")) == world.vocabulary
    trained = load_file(tmp_path / "checkpoints" / "step-00000060" / "model.safetensors")
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_same_command_gives_the_same_numbers(world: World, tmp_path: Path) -> None:
    for name in ("a", "b"):
        go(world.job(tmp_path / name))
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    go(world.job(tmp_path / "c", seed=1))
    assert losses(tmp_path / "c") != losses(tmp_path / "a")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_run_cut_off_anywhere_goes_on_bit_equal(arch: str, tmp_path: Path) -> None:
    """gpt2 has dropout: its generators must come back too. What lies after the checkpoint is thrown away."""
    world = build_world(tmp_path / "world", arch=arch)
    whole = tmp_path / "whole"
    go(world.job(whole, checkpoint_every=1, keep_last=20, eval_every=3))
    expected, weights = log_of(whole), load_file(whole / "export" / "model.safetensors")
    for step in (0, 1, 5, 8):
        cut = cut_after(whole, step)
        with (cut / "log.jsonl").open("a") as file:
            file.write('{"kind": "step", "st')
        go(world.job(cut, checkpoint_every=1, keep_last=20, eval_every=3))
        assert log_of(cut) == expected
        again = load_file(cut / "export" / "model.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
        results = [json.loads((folder / "result.json").read_text()) for folder in (cut, whole)]
        assert {key for key in results[0] if results[0][key] != results[1][key]} <= {
            "seconds",
            "seconds_waited",
            "export",
        }


def test_log_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"kind": "step", "step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"kind"')
    cut_back(path, done=2, total=9)
    assert path.read_text().splitlines() == lines[:2]
    evaluation = json.dumps({"kind": "evaluation", "step": 2}) + "\n"
    path.write_text(lines[1] + "\n" + evaluation)
    cut_back(path, done=2, total=9)
    assert path.read_text().splitlines() == [lines[1], evaluation.strip()]
    cut_back(path, done=2, total=2)
    assert path.read_text().splitlines() == lines[1:2]
    before = json.dumps({"kind": "evaluation", "step": 0})  # made up for at the end, and done again
    for held, kept in (([before, lines[0]], [before, lines[0]]), ([lines[0], before], [lines[0]])):
        path.write_text("\n".join(held) + "\n")
        cut_back(path, done=2, total=9)
        assert path.read_text().splitlines() == kept
    cut_back(path, done=0, total=9)
    assert path.read_text() == ""


def test_epochs_train_every_pack_and_the_last_step_may_be_smaller(world: World, tmp_path: Path) -> None:
    result = go(world.job(tmp_path, epochs=2, batch_packs=3, eval_packs=1))
    stream = Stream(manifest=Manifest.open(world.manifest), snapshot=Snapshot.read(world.snapshot), window=48, epochs=2)
    count = [stream.packs_per_epoch(epoch) for epoch in (0, 1)]
    assert result["packs"] == sum(count)
    assert result["steps"] == math.ceil(sum(count) / 3)
    seen = [(r["epoch"], p) for r in log_of(tmp_path) if r["kind"] == "step" for p in r["packs"]]
    assert len(seen) == sum(count)


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_change_rounding_only(packing: bool, world: World, tmp_path: Path) -> None:
    """Packs differ in their number of trained positions: dividing per micro-batch would show."""
    for micro in (1, 2, 4):
        go(world.job(tmp_path / str(micro), batch_packs=4, micro_packs=micro, packing=packing, steps=4))
    for micro in (2, 4):
        assert losses(tmp_path / str(micro)) == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def test_packed_and_unpacked_rows_have_the_same_loss(world: World) -> None:
    """One pack against its sequences row by row: isolation holds through loss and gradient."""
    manifest, snapshot = Manifest.open(world.manifest), Snapshot.read(world.snapshot)
    counts, results = [], []
    for packing in (True, False):
        packs = list(Stream(manifest=manifest, snapshot=snapshot, window=48, epochs=1, pack=packing))
        config = world.job(Path("unused"), packing=packing).student
        model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(0.3)
        trainer = Trainer(model, config, vocabulary=world.vocabulary, total_steps=1, device=torch.device("cpu"))
        counts.append(len(packs))
        results.append(trainer.step(packs, 0))
    assert counts[0] < counts[1]
    assert results[0].trained == results[1].trained
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-3)


def test_gradient_checkpointing_changes_no_number(world: World, tmp_path: Path) -> None:
    go(world.job(tmp_path / "plain"))
    go(world.job(tmp_path / "saving", gradient_checkpointing=True))
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_bf16_autocast_trains_and_keeps_float32_weights(world: World, tmp_path: Path) -> None:
    go(world.job(tmp_path / "exact", steps=3))
    go(world.job(tmp_path / "bf16", steps=3, precision="bfloat16"))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "exact"), rel=0.05)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "exact")
    weights = load_file(tmp_path / "bf16" / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_export_may_be_half_as_large(world: World, tmp_path: Path) -> None:
    go(world.job(tmp_path, steps=1, export_dtype="bfloat16"))
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"


def test_hard_labels_need_no_store(world: World, tmp_path: Path) -> None:
    result = go(world.job(tmp_path, signal=False, losses={"alpha": 0}))
    assert result["after"]["kl"] is None
    assert result["after"]["perplexity"] < result["before"]["perplexity"]
    assert all(r["kd"] is None and r["ce"] == r["loss"] for r in log_of(tmp_path) if r["kind"] == "step")


def test_distillation_alone_is_a_choice_too(world: World, tmp_path: Path) -> None:
    go(world.job(tmp_path, steps=2, losses={"alpha": 1, "temperature": 4}))
    assert all(r["ce"] is None and r["kd"] == r["loss"] for r in log_of(tmp_path) if r["kind"] == "step")


def test_a_padded_head_trains_and_padded_ids_stay_out(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", padded=9)
    result = go(world.job(tmp_path / "run", steps=3))
    assert result["before"]["kl"] > 0
    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert len(weights["model.embed_tokens.weight"]) == world.vocabulary + 9


def poisoned(world: World, config: Any) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    return Trainer(model, config, vocabulary=world.vocabulary, total_steps=4, device=torch.device("cpu"))


def test_a_loss_that_is_not_finite_names_its_sequences(world: World) -> None:
    packs = list(
        Stream(manifest=Manifest.open(world.manifest), snapshot=Snapshot.read(world.snapshot), window=48, epochs=1)
    )[:2]
    with pytest.raises(NonFiniteLoss, match="step 4: loss nan") as caught:
        poisoned(world, world.job(Path("unused")).student).step(packs, 3)
    assert packs[0].sequences[0] in str(caught.value)
    trainer = poisoned(world, world.job(Path("unused"), on_nan="skip").student)
    before = trainer.model.model.embed_tokens.weight.clone()
    result = trainer.step(packs, 3)
    assert result.skipped
    assert result.loss is None
    assert torch.equal(before, trainer.model.model.embed_tokens.weight)
    assert trainer.model.model.embed_tokens.weight.grad is None


def with_weights(world: World, path: Path, weights: dict[int, float]) -> World:
    """The same corpus, in which some rows weigh what is said."""
    manifest = Manifest.open(world.manifest)
    with ManifestWriter(path) as writer:
        for number, row in enumerate(manifest):
            writer.append(replace(row, weight=weights.get(number, row.weight)))
        writer.commit(manifest.meta)
    return replace(world, manifest=path)


def overweight(world: World, folder: Path, **fields: Any) -> tuple[StudentJob, list[Pack], list[bool]]:
    """A job whose losses are not finite in float32 where two sequences come, and the packs of its steps, one each;
    the first two are whole."""

    def packs_of(manifest: Path) -> list[Pack]:
        snapshot = Snapshot.read(world.snapshot)
        return list(islice(Stream(manifest=Manifest.open(manifest), snapshot=snapshot, window=48), 12))

    heavy = [int(pack.rows[0]) for pack in packs_of(world.manifest)[2:6:3] if pack.rows is not None]
    changed = with_weights(world, folder / "manifest.parquet", dict.fromkeys(heavy, 3e38))
    job = changed.job(folder / "run", steps=12, batch_packs=1, **fields)
    packs = packs_of(changed.manifest)
    poisoned = [bool((pack.weights > 1e38).any()) for pack in packs]
    assert poisoned[:6] == [False, False, True, False, False, True]
    return job, packs, poisoned


def test_a_run_stops_with_the_units_of_the_batch(world: World, tmp_path: Path) -> None:
    """The store has three, and a pack is of one."""
    job, packs, _ = overweight(world, tmp_path)
    with pytest.raises(NonFiniteLoss) as caught:
        go(job)
    assert len(losses(job.run_dir)) == 2
    units = Snapshot.read(world.snapshot).units
    (held,) = [unit.id for unit in units if set(packs[2].sequences) <= set(unit.sequences)]
    said = f"step 3: loss inf, .*; units {held}; packs 0/2 \\(epoch/number\\), sequences "
    assert re.search(said + ", ".join(packs[2].sequences), str(caught.value))
    assert not [unit.id for unit in units if unit.id != held and unit.id in str(caught.value)]


def test_on_nan_skip_counts_and_goes_on(world: World, tmp_path: Path) -> None:
    """Also where the run was cut off after a step that it left out."""
    job, _, poisoned = overweight(world, tmp_path, on_nan="skip", checkpoint_every=1, keep_last=20)
    result = go(job)
    steps = [record for record in log_of(job.run_dir) if record["kind"] == "step"]
    assert [step["skipped"] for step in steps] == poisoned
    assert [step["loss"] is None for step in steps] == poisoned
    assert 2 <= result["skipped_steps"] == sum(poisoned) < result["steps"] == 12
    assert result["after"]["kl"] < result["before"]["kl"]
    cut = job.model_copy(update={"run_dir": cut_after(job.run_dir, 3)})
    assert go(cut)["skipped_steps"] == sum(poisoned)
    assert log_of(cut.run_dir) == log_of(job.run_dir)


def test_a_step_without_weight_is_skipped(world: World) -> None:
    (pack,) = list(
        Stream(manifest=Manifest.open(world.manifest), snapshot=Snapshot.read(world.snapshot), window=48, epochs=1)
    )[:1]
    trainer = poisoned(world, world.job(Path("unused")).student)
    assert trainer.step([replace(pack, weights=0 * pack.weights)], 0).skipped


def test_decay_spares_norms_biases_and_embeddings(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, arch="gpt2", vocabulary=64)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, rest = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1))
    assert all(".weight" in n and "ln" not in n and "wte" not in n and "wpe" not in n for n in decayed)
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} <= set(rest)
    assert len(decayed) + len(rest) == len(names)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"window": 64}, RecipeError, "set it to at most 48"),
        ({"device": "cuda:7"}, RecipeError, "cuda:7 is not there"),
        ({"model": {"cut": {"layers": 9}}}, StudentError, "the teacher has 4"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    fields: dict[str, Any], error: type[Exception], says: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        go(world.job(tmp_path, **fields))


def test_a_student_of_another_tokenizer_is_refused_before_its_weights_load(world: World, tmp_path: Path) -> None:
    other = tiny_teacher(tmp_path / "other", vocabulary=330)
    (other / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(TokenizerMismatch, match="sequence-level"):
        go(world.job(tmp_path / "run", model={"from": str(other)}))


def test_a_student_that_reads_less_than_a_sequence_is_refused(world: World, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(tmp_path / "short")
    tiny_model(tmp_path / "short", vocabulary=world.vocabulary, max_position_embeddings=16)
    with pytest.raises(StudentError, match="reads at most 16"):
        go(world.job(tmp_path / "run", model={"from": str(tmp_path / "short")}))


def test_a_finished_run_is_found_and_another_one_is_not_overwritten(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = world.job(tmp_path / "run", steps=2)
    path = tmp_path / "job.json"
    path.write_text(job.model_dump_json())
    assert main([str(path)]) == 0
    result = json.loads((job.run_dir / "result.json").read_text())
    bindings = bindings_of(job, Manifest.open(job.manifest), Snapshot.read(world.snapshot))
    assert finished(job, bindings) == result
    assert main([str(path)]) == 0
    assert "already trained" in capsys.readouterr().err
    path.write_text(world.job(tmp_path / "run", steps=2, lr=1e-3).model_dump_json())
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert "lr: 0.002 there, 0.001 asked" in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_other_settings_is_refused(world: World, tmp_path: Path) -> None:
    go(world.job(tmp_path, steps=3))
    (tmp_path / "result.json").unlink()
    with pytest.raises(StudentError, match="seed: 0 there, 1 asked"):
        go(world.job(tmp_path, steps=3, seed=1))
    with pytest.raises(StudentError, match=r"another run \(losses.alpha: 0.7 there, 0.6 asked\)\."):
        go(world.job(tmp_path, steps=3, losses={"alpha": 0.6}))
    with pytest.raises(StudentError, match=r"another run \(phases.0.lr"):
        go(world.job(tmp_path, steps=None, phases=[{"steps": 3, "lr": 1e-4}]))
    go(world.job(tmp_path, steps=3, keep_last=1, log_every=5))


def test_two_processes_do_not_train_in_one_folder(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.json"
    path.write_text(world.job(tmp_path / "run").model_dump_json())
    with locked(tmp_path / "run"):
        assert main([str(path)]) == 1
    assert "another process is training" in capsys.readouterr().err


def test_bad_usage_has_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("error: usage")
