"""How much of the teacher's own speed is left when its signal is kept: `capture_ratio`, and the memory it takes.

Enters: nothing. Leaves: its keys in `build/bench.json`. Costs: eight minutes on two cores.

    python -m tests.bench.capture [--output build/bench.json]

Two ways take turns over the same units: the pipeline (driver, one Ray actor, local store, commit), and a bare loop that
runs the same batches through the same model, makes the logits in the same slices and throws them away. The ratio of
their tokens/s is taken in each turn; what is stated is the median, with the smallest and the largest. Which of them is
first changes with every turn.

Memory is the peak of a process of its own, one for each way, over a teacher with Qwen3's vocabulary of 151,936.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from stillroom.pipeline.cluster import Actors, session
from stillroom.pipeline.options import unit_of
from stillroom.pipeline.pool import Pool
from stillroom.pipeline.recipe.teacher_schema import RayConfig
from stillroom.storage.identity import Identity
from stillroom.storage.records import Receipt, Sequence, SignalSpec, TopKSpec, Unit
from stillroom.storage.store import create_store
from stillroom.workers.actor import TeacherActor, remote_actor
from stillroom.workers.source import load_tokenizer, resolve_model
from stillroom.workers.teacher import TeacherSpec, TruthRequest
from stillroom.workers.torch_teacher import TorchTeacher
from tests.bench.results import merged
from tests.bench.teacher import MODEL, text

SIGNAL = SignalSpec(TopKSpec(64))
TURNS = 36
UNITS = 1  # of a turn: few seconds, as the speed of a machine that others share changes with the minute
SEQUENCES = 4  # of a unit
WINDOW = 512
LARGE_VOCABULARY = 151_936


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--memory-of", choices=("bare", "capture"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(_peak_mb(arguments.memory_of, arguments.folder))
        return
    result = {**_speed(arguments.turns), **_memory()}
    with merged(arguments.output) as held:
        held |= result
    for key, value in result.items():
        Console().print(f"{key}: {value}", highlight=False)


def _speed(turns: int) -> dict[str, Any]:
    folder = resolve_model(MODEL)
    spec = TeacherSpec(folder=folder, dtype="float32", device="cpu", threads=2)
    alone = ThreadPoolExecutor(1)  # as in the actor: this process's own thread has another heap
    bare = alone.submit(TorchTeacher, spec).result()
    identity = Identity(teacher=MODEL, signal=SIGNAL, **bare.identity_parts())
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    ids = np.array(tokenizer(text())["input_ids"], np.int32)
    work = _units(ids, turns * UNITS)
    ratios, bare_speeds = [], []
    config = RayConfig(actors=1, cpus_per_actor=2)
    with tempfile.TemporaryDirectory() as root, session(config):
        store = create_store(str(Path(root) / "store"), identity)
        store.save_plan([unit for unit, _ in work])

        def create(**options: Any) -> Any:
            return remote_actor(**options).remote(spec, identity, store.uri)

        pool = Pool(Actors(create, config), config, print)
        pool.start()

        def piped(part: list[tuple[Unit, list[Sequence]]]) -> None:
            events = pool.run((*pair, TruthRequest()) for pair in part)
            found = [event for event in events if isinstance(event, Receipt)]
            assert len(found) == len(part)
            store.commit(found)

        def discarded(part: list[tuple[Unit, list[Sequence]]]) -> None:
            for _, sequences in part:
                alone.submit(_discard, bare, sequences).result()

        tokens = UNITS * SEQUENCES * WINDOW
        for turn in range(turns):
            part = work[turn * UNITS : (turn + 1) * UNITS]
            seconds = {}
            for way in (piped, discarded) if turn % 2 else (discarded, piped):
                started = time.perf_counter()
                way(part)
                seconds[way] = time.perf_counter() - started
            ratios.append(seconds[discarded] / seconds[piped])
            bare_speeds.append(tokens / seconds[discarded])
            print(f"turn {turn + 1}: {ratios[-1]:.3f} of {bare_speeds[-1]:.0f} tokens/s", file=sys.stderr)
        pool.stop()
    return {
        "capture_ratio": round(median(ratios), 3),
        "capture_ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "capture_turns": turns,
        "bare_tokens_per_s": round(median(bare_speeds), 1),
    }


def _units(ids: np.ndarray[Any, Any], count: int) -> list[tuple[Unit, list[Sequence]]]:
    """`count` units; where the text ends it begins again, shifted, so that no two sequences are equal."""
    needed = count * SEQUENCES * WINDOW
    rounds = -(-needed // (len(ids) - 100))
    flat = np.concatenate([ids[shift : len(ids) - 100 + shift] for shift in range(rounds)])[:needed]
    sequences = [Sequence(row) for row in flat.reshape(-1, WINDOW)]
    groups = [sequences[i : i + SEQUENCES] for i in range(0, len(sequences), SEQUENCES)]
    return [(unit_of(group), group) for group in groups]


@torch.inference_mode()
def _discard(teacher: TorchTeacher, sequences: list[Sequence]) -> None:
    """The same batches, the same slices of logits by the model's own head, and nothing of them."""
    model = teacher._model
    assert model is not None
    head = model.model.get_output_embeddings()
    for group in teacher.batches(sequences):
        rows = [torch.from_numpy(sequences[i].input_ids.astype(np.int64)) for i in group]
        hidden_ND = model.hidden(torch.stack(rows), None).flatten(0, 1)
        for start in range(0, len(hidden_ND), teacher._slice):
            head(hidden_ND[start : start + teacher._slice])


def _memory() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        _large_teacher(Path(root))
        peaks = {}
        for way in ("bare", "capture"):
            command = [sys.executable, "-m", "tests.bench.capture", "--memory-of", way, "--folder", root]
            peaks[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {
        "capture_peak_beyond_bare_mb": round(peaks["capture"] - peaks["bare"], 1),
        "bare_peak_mb": peaks["bare"],
    }


def _large_teacher(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(LARGE_VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=LARGE_VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        )
    ).save_pretrained(folder)  # fmt: skip


def _peak_mb(way: str, folder: Path) -> float:
    """Of this process, after two units: 16,384 tokens."""
    spec = TeacherSpec(folder=folder, dtype="float32", device="cpu", threads=1)
    work = list(_large_units())
    if way == "bare":
        with ThreadPoolExecutor(1) as alone:
            teacher = alone.submit(TorchTeacher, spec).result()
            for _, sequences in work:
                alone.submit(_discard, teacher, sequences).result()
    else:
        with tempfile.TemporaryDirectory() as root:
            identity = Identity(teacher="large", signal=SIGNAL, **TorchTeacher(spec).identity_parts())
            actor = TeacherActor(spec, identity, str(Path(root) / "store"))
            for unit, sequences in work:
                actor.score_unit(unit, sequences)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def _large_units() -> Iterator[tuple[Unit, list[Sequence]]]:
    rng = np.random.default_rng(0)
    for _ in range(2):
        sequences = [Sequence(rng.integers(0, LARGE_VOCABULARY, WINDOW).astype(np.int32)) for _ in range(16)]
        yield unit_of(sequences), sequences


if __name__ == "__main__":
    main()
