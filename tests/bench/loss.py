"""What distillation costs over cross-entropy alone, and the memory of output head and loss.

Enters: nothing. Leaves: its keys in `build/bench.json`. Costs: four minutes on two cores, 14 GiB for half a minute.

    python -m tests.bench.loss [--output build/bench.json] [--turns 12] [--only step|memory]

`kd_step_ratio`: a step on the text and the stored top-64 at T = 1, over a step on the text alone;
`kd_step_ratio_t4_ce`: at T = 4, where the two need an exp of each logit each. Both are alpha = 0.7. The student is the
demo's cut of ten layers (V = 49,152), 1,024 tokens a step, trained by the product's own `Trainer` with the fused head,
its packs read from the product's own `Stream` within the time that is taken (those of the text alone lie in memory). In
each turn the three take one step on the same batch; which is first changes. The median of the turns' ratios is stated,
with the smallest and the largest.

`loss_peak_ratio`: peak memory of a process over what it had before, fused (T = 4, with text) over dense and eager (the
KD term alone, by log_softmax, softmax and kl_div), both with the head's gradient: 4,096 positions, V = 151,936,
D = 1,024, float32. The dense one is given the teacher's logits, which are counted: that it needs them is its cost.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.losses import Objective, StudentHead, Targets
from stillroom.pipeline.student.model import build_student, load_tokenizer
from stillroom.pipeline.student.teaching import distillation_loss_fused
from stillroom.pipeline.student.trainer import Trainer
from stillroom.storage.manifest import Manifest, ManifestMeta, ManifestRow
from stillroom.storage.manifest_writer import ManifestWriter
from stillroom.storage.records import Pack, SignalSpec, TopKSpec
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream
from tests.bench.results import merged
from tests.bench.store import build
from tests.bench.teacher import WINDOW, Scored, scored

K = 64
TURNS = 12
PACKS = 2
#: What takes turns: alpha and temperature.
WAYS = {"ce": (0.0, 1.0), "kd": (0.7, 1.0), "kd_t4_ce": (0.7, 4.0)}
POSITIONS, VOCABULARY, WIDTH = 4096, 151_936, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--only", choices=("step", "memory"))
    parser.add_argument("--positions", type=int, default=POSITIONS, help="of the memory's measurement")
    parser.add_argument("--memory-of", choices=("fused", "dense"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(_peak_mib(arguments.memory_of, arguments.positions))
        return
    result: dict[str, Any] = {}
    if arguments.only != "step":
        result |= memory(arguments.positions)
    if arguments.only != "memory":
        with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as folder:
            result |= step_ratios(scored(), Path(folder), arguments.turns)
    with merged(arguments.output) as held:
        held |= result
    for key, value in result.items():
        Console().print(f"{key}: {value}", highlight=False)


def step_ratios(data: Scored, folder: Path, turns: int) -> dict[str, Any]:
    store = build(data, SignalSpec(TopKSpec(K)), folder / "store")
    manifest, snapshot = _manifest(data, folder / "manifest.parquet"), store.snapshot()
    model = _student(data)
    trainers = {name: _trainer(model, data.identity.vocabulary, *way, turns=turns) for name, way in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    waits: dict[str, list[float]] = {name: [] for name in WAYS}
    with ExitStack() as opened:
        streams: dict[str, Iterator[Pack]] = {
            name: opened.enter_context(closing(_packs(manifest, snapshot))) for name in WAYS
        }
        # The text's packs lie in memory: that they cost nothing to read is to the disadvantage of the others.
        streams["ce"] = iter([replace(pack, signal=None) for pack in islice(streams["ce"], (turns + 1) * PACKS)])
        for turn in range(turns + 1):
            order = list(WAYS)[turn % 3 :] + list(WAYS)[: turn % 3]
            batches = {}
            for name in order:
                began = time.perf_counter()
                packs = batches[name] = [next(streams[name]) for _ in range(PACKS)]
                waited = time.perf_counter() - began
                trainers[name].step(packs, turn)
                if turn:  # the first makes the optimizers' memory
                    seconds[name].append(time.perf_counter() - began)
                    waits[name].append(waited)
            _require_same(batches)
    found: dict[str, Any] = {"loss_bench_steps_s": {n: [round(s, 3) for s in row] for n, row in seconds.items()}}
    for key, name in (("kd_step_ratio", "kd"), ("kd_step_ratio_t4_ce", "kd_t4_ce")):
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds["ce"], strict=True)]
        found[key] = round(median(ratios), 4)
        found[f"{key}_spread"] = [round(min(ratios), 4), round(max(ratios), 4)]
        shares = [wait / took for wait, took in zip(waits[name], seconds[name], strict=True)]
        found[f"{key}_data_wait"] = round(median(shares), 5)
    return found


def _manifest(data: Scored, path: Path) -> Manifest:
    with ManifestWriter(path) as writer:
        for number, sequence in enumerate(data.sequences):
            mask = np.ones(len(sequence.input_ids), dtype=bool)
            writer.append(ManifestRow(sequence, mask, 1.0, number, "topics", number + 1, heldout=False))
        writer.commit(
            ManifestMeta(
                window=WINDOW, overlap=0, tokenizer=data.identity.tokenizer, chat_template=None,
                vocabulary=data.identity.vocabulary, counts={}, config={}, inputs="",
            )
        )  # fmt: skip
    return Manifest.open(path)


def _packs(manifest: Manifest, snapshot: Snapshot) -> Generator[Pack, None, None]:
    yield from Stream(manifest=manifest, snapshot=snapshot, window=WINDOW, parts=frozenset({"topk"}))


def _require_same(batches: dict[str, list[Pack]]) -> None:
    ids = [np.concatenate([pack.input_ids for pack in packs]) for packs in batches.values()]
    assert all(np.array_equal(ids[0], other) for other in ids[1:]), "the ways were given different batches"


def _config(alpha: float, temperature: float) -> StudentConfig:
    return StudentConfig.model_validate({
        "name": "bench", "model": {"cut": {"layers": 10}}, "steps": 1000, "batch_packs": PACKS, "micro_packs": PACKS,
        "lr": 1e-5, "losses": {"alpha": alpha, "temperature": temperature, "fused": True},
    })  # fmt: skip


def _student(data: Scored) -> Any:
    return build_student(
        _config(*WAYS["ce"]).model, teacher=data.folder, tokenizer=load_tokenizer(data.folder),
        expected_tokenizer=data.identity.tokenizer, vocabulary=data.identity.vocabulary,
    )  # fmt: skip


def _trainer(model: Any, vocabulary: int, alpha: float, temperature: float, *, turns: int) -> Trainer:
    """The three share the model: its weights move by what each learns, and its shapes are the same."""
    config = _config(alpha, temperature)
    return Trainer(model, config, vocabulary=vocabulary, total_steps=turns + 1, device=torch.device("cpu"))


def memory(positions: int) -> dict[str, Any]:
    peaks = {}
    for way in ("fused", "dense"):
        command = [sys.executable, "-m", "tests.bench.loss", "--memory-of", way, "--positions", str(positions)]
        peaks[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "loss_peak_ratio": round(peaks["fused"] / peaks["dense"], 4),
        "loss_peak_mib": {way: round(peak) for way, peak in peaks.items()},
    }


def _peak_mib(way: str, positions: int) -> float:
    """Over what the process had with hidden states, head and targets in memory."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(positions, WIDTH, generator=generator).requires_grad_()
    weight_VD = torch.nn.Parameter(0.02 * torch.randn(VOCABULARY, WIDTH, generator=generator))
    before = _status_mib("VmRSS")
    if way == "dense":
        teacher_NV = torch.randn(positions, VOCABULARY, generator=generator)
        log_q_NV = torch.log_softmax(hidden_ND @ weight_VD.T / 4.0, -1)
        loss = 16.0 * torch.nn.functional.kl_div(log_q_NV, torch.softmax(teacher_NV / 4.0, -1), reduction="sum")
    else:
        ids_NK = torch.randint(0, VOCABULARY // K, (positions, K), generator=generator) + torch.arange(K) * (
            VOCABULARY // K
        )
        targets = Targets(
            torch.randint(0, VOCABULARY, (positions,), generator=generator), torch.ones(positions), ids_NK,
            torch.randn(positions, K, generator=generator), torch.full((positions,), 12.0),
        )  # fmt: skip
        loss = distillation_loss_fused(
            hidden_ND, StudentHead(weight_VD), targets, objective=Objective(0.7, 4.0), vocabulary=VOCABULARY
        ).total
    (loss / positions).backward()
    assert weight_VD.grad is not None
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    """Of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


if __name__ == "__main__":
    main()
