"""A small real world for the student: a tiny teacher's folder, a manifest, and shards of its logits with a snapshot."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.student.config import StudentConfig, StudentJob
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity, tokenizer_digest
from stillroom.storage.manifest import ManifestMeta, ManifestRow
from stillroom.storage.manifest_writer import ManifestWriter
from stillroom.storage.records import BETAS, Pack, Sequence, Signal, SignalSpec, TopK, TopKSpec, Unit
from stillroom.storage.shard import StoredSequence, write_shard
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import assemble
from tests.tiny import WORDS, tiny_teacher

WINDOW = 48


def topk_of(logits_RV: torch.Tensor, k: int) -> TopK:
    """What a teacher keeps of dense logits [R, V]."""
    z_RV = logits_RV.double()
    top = z_RV.topk(k, dim=-1)
    rest_RV = z_RV.scatter(-1, top.indices, -torch.inf)
    tail_RG = torch.stack([torch.logsumexp(beta * rest_RV, -1) for beta in BETAS], -1)
    return TopK(
        top.indices.numpy().astype(np.int32), top.values.numpy().astype(np.float32), tail_RG.numpy().astype(np.float32)
    )


@torch.no_grad()
def score(model: Any, sequence: Sequence, *, vocabulary: int, k: int) -> TopK:
    """The teacher on one sequence alone."""
    ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None]
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, sequence.first_position :, :vocabulary]
    return topk_of(logits_TV, k)


def pack_of(sequences: list[Sequence], topks: list[TopK] | None, *, window: int, index: int = 0) -> Pack:
    """Sequences laid into one pack by the stream's own hand, every token learned."""
    blocks = [Signal(topk) for topk in topks] if topks is not None else [None] * len(sequences)
    masks = [np.ones(len(s.input_ids), dtype=bool) for s in sequences]
    return assemble(
        [StoredSequence(s, b) for s, b in zip(sequences, blocks, strict=True)],
        masks,
        np.ones(len(sequences), dtype=np.float32),
        tuple(s.digest for s in sequences),
        window=window,
        epoch=0,
        index=index,
    )


@dataclass(frozen=True)
class World:
    """Paths of all that a job names."""

    teacher: Path
    manifest: Path
    snapshot: Path
    vocabulary: int

    def job(self, run_dir: Path, *, signal: bool = True, **student: Any) -> StudentJob:
        """A job of a two-layer cut, ten steps, with the given fields changed."""
        settings: dict[str, Any] = {
            "name": "small", "model": {"cut": {"layers": 2}}, "steps": 8, "batch_packs": 2, "lr": 2e-3,
            "warmup_steps": 2, "checkpoint_every": 3, "log_every": 1, "device": "cpu",
        }  # fmt: skip
        if "epochs" in student:
            del settings["steps"]
        return StudentJob(
            student=StudentConfig.model_validate(settings | student),
            manifest=self.manifest,
            snapshot=self.snapshot if signal else None,
            run_dir=run_dir,
            tokenizer=self.teacher,
            teacher=self.teacher,
        )


def cut_after(whole: Path, step: int) -> Path:
    """A copy of a run's folder as a kill after this step leaves it: beside it, without the result and later
    checkpoints."""
    cut = whole.with_name(f"cut{step}")
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    for path in (cut / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return cut


def documents_of(tokenizer: Any, count: int) -> list[NDArray[np.int32]]:
    """Token ids of random runs of words; lengths from 1 token to the window."""
    generator = np.random.default_rng(5)
    words = WORDS.split()
    found = []
    for number in range(count):
        text = " ".join(generator.choice(words, size=int(generator.integers(1, 16))))
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)[: 1 if number == 0 else WINDOW]
        found.append(ids)
    return found


def build_world(folder: Path, *, arch: str = "llama", layers: int = 4, padded: int = 0, k: int = 16) -> World:
    """Sixty documents, a quarter held out, in three shards; gaps kept as float32."""
    teacher = tiny_teacher(folder / "teacher", arch=arch, padded=padded, layers=layers)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    digest, vocabulary = tokenizer_digest(tokenizer.backend_tokenizer.to_str()), len(tokenizer)
    sequences = [Sequence(ids) for ids in documents_of(tokenizer, 60)]
    with ManifestWriter(folder / "manifest.parquet") as writer:
        for number, sequence in enumerate(sequences):
            mask = np.ones(len(sequence.input_ids), dtype=bool)
            writer.append(ManifestRow(sequence, mask, 1.0, number, "words", number + 1, heldout=number % 4 == 1))
        writer.commit(
            ManifestMeta(
                window=WINDOW, overlap=0, tokenizer=digest, chat_template=None, vocabulary=vocabulary, counts={},
                config={}, inputs="",
            )
        )  # fmt: skip
    identity = Identity("tiny", "weights", "config", digest, vocabulary, "float32", None, SignalSpec(TopKSpec(k, None)))
    _write_shards(folder / "store", identity, list({s.digest: s for s in sequences}.values()), teacher, folder)
    return World(teacher, folder / "manifest.parquet", folder / "snapshot.parquet", vocabulary)


def _write_shards(root: Path, identity: Identity, sequences: list[Sequence], teacher: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    topk = identity.signal.topk
    assert topk is not None
    root.mkdir()
    files = open_files(str(root))
    units, refs = [], {}
    for start in range(0, len(sequences), 20):
        part = sequences[start : start + 20]
        unit = Unit(
            tuple(s.digest for s in part), tuple(len(s.input_ids) for s in part), tuple(s.context for s in part)
        )
        blocks = [Signal(score(model, s, vocabulary=identity.vocabulary, k=topk.k)) for s in part]
        ref = write_shard(files, identity, unit, part, blocks, {})
        units.append(unit)
        refs[unit.id] = ref
    Snapshot(files.uri, identity, tuple(units), refs).write(folder / "snapshot.parquet")
