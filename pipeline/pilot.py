"""A pilot: score a few sequences of the plan in this process, to know what the rest will cost and what would be kept.

Enters: a recipe and a plan. Leaves: bytes and hours for what is pending, and a table of what a store of this teacher
could keep: bytes per token and fidelity by tier, k and temperature, with the cheapest that serves the recipe's
students. Costs: loading the teacher once, scoring `PILOT_TOKENS` tokens, and encoding them once per choice; nothing is
committed.
"""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from stillroom.pipeline.console import Console
from stillroom.pipeline.inside import price_inside
from stillroom.pipeline.options import (
    STEPS,
    Option,
    Pilot,
    candidates,
    cheapest,
    coarsest,
    most,
    price_all,
    side_bytes,
    side_of,
    step_of,
    stepped,
    unit_of,
    usual_k,
    with_side,
)
from stillroom.pipeline.plan import Plan
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.storage.calibration import Calibration, head_path
from stillroom.storage.errors import TeacherError
from stillroom.storage.fidelity.bound import Bound
from stillroom.storage.fidelity.measure import TEMPERATURES
from stillroom.storage.fidelity.sample import choose
from stillroom.storage.files import open_files, sha256_hex
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Sequence, Signal, SignalSpec

#: Enough for bytes per token to 3 % (real teacher, k = 64), and some seconds of a small teacher on a CPU.
PILOT_TOKENS = 2048

#: Positions whose truth a pilot keeps: means of angles to about a tenth of themselves.
PILOT_POSITIONS = 48


@dataclass(frozen=True)
class _Scored:
    """specs: the choices that the pilot's signals can be cut to. seconds: of scoring the signal of the recipe alone.
    inside: see `price_inside`."""

    pilot: Pilot
    specs: list[SignalSpec]
    seconds: float
    inside: list[tuple[str, float]]

    @property
    def tokens(self) -> int:
        return sum(len(s.input_ids) for s in self.pilot.sequences)

    @property
    def head_bytes(self) -> int | None:
        return len(self.pilot.head[1]) if self.pilot.head else None


def estimate(recipe: Recipe, plan: Plan, manifest: Manifest, sources: Sources, console: Console) -> dict[str, Any]:
    """What teaching the plan will take. hours: with `ray.actors` teachers as fast as this process's one."""
    wanted = sorted({t for s in recipe.students for t in s.temperatures(TEMPERATURES)}) or [1.0]
    bound = Bound(recipe.fidelity.max_gradient_angle_deg, recipe.fidelity.max_kl_added)
    scored = _score(plan, manifest, sources, console)
    options, step = _priced(scored, bound, wanted, console)
    total = round(options[0].bytes_per_token * plan.pending_tokens)
    free = open_files(recipe.store.path).free_bytes()
    per_second = scored.tokens / scored.seconds
    hours = plan.pending_tokens / per_second / recipe.ray.actors / 3600
    best = cheapest(options, bound, wanted)
    return {
        "pilot_tokens": scored.tokens,
        "bytes_per_token": round(options[0].bytes_per_token, 1),
        "tokens_per_s_per_actor": round(per_second, 1),
        "bytes": total,
        "hours": round(hours, 4),
        "fits": free is None or total * recipe.store.safety + recipe.store.min_free_bytes <= free,
        "head_bytes": scored.head_bytes,
        "student_temperatures": ", ".join(f"{t:g}" for t in wanted),
        "recipe_keeps": options[0].spec.in_words(),
        "recipe_misses": "; ".join(options[0].misses(bound, wanted)) or "nothing",
        "coarsest_gap_step": step,
        "cheapest": best.spec.in_words() if best else None,
        "cheapest_bytes_per_token": round(best.bytes_per_token, 1) if best else None,
        "options": [line for option in options for line in _lines(option, bound, plan.pending_tokens, hours)],
        "also": [
            {"keeps": name, "bytes_per_token": round(size, 1), "corpus_bytes": round(size * plan.pending_tokens)}
            for name, size in scored.inside
        ],
    }


def _score(plan: Plan, manifest: Manifest, sources: Sources, console: Console) -> _Scored:
    """All that the teacher is needed for."""
    from stillroom.workers.digests import layers_and_heads
    from stillroom.workers.torch_teacher import TorchTeacher

    sequences = _sample(plan, manifest)
    console.info(f"plan: a pilot of {sum(len(s.input_ids) for s in sequences):,} tokens")
    teacher, identity = TorchTeacher(sources.teacher_spec()), sources.identity()
    head = _head(teacher, console, needed=identity.signal.hidden is not None)
    specs = candidates(
        identity.signal, vocabulary=identity.vocabulary, width=teacher.hidden_width, hidden=head is not None
    )
    teacher.score(sequences[:1], signal=identity.signal)  # the first pass pays for what the others do not
    start = time.monotonic()
    teacher.score(sequences, signal=identity.signal)
    seconds = time.monotonic() - start
    positions = choose([unit_of(sequences)], wanted=PILOT_POSITIONS)
    signal = replace(
        most(specs, vocabulary=identity.vocabulary),
        layers=identity.signal.layers,
        attention=identity.signal.attention,
    )
    scored = teacher.score_with_truth(sequences, signal=signal, positions=positions)
    inside = price_inside(
        teacher, identity, sequences, plan.pending, layers_and_heads(sources.teacher_folder), console.notice
    )
    teacher.release()
    kept = (head_path(sha256_hex(head[0])), head[0]) if head else None
    calibrations = _calibrations(head[1], scored.signals) if head else {}
    pilot = Pilot(identity, sequences, scored.signals, scored.truth, positions, kept, calibrations)
    return _Scored(pilot, specs, seconds, inside)


def _priced(scored: _Scored, bound: Bound, wanted: Seq[float], console: Console) -> tuple[list[Option], str]:
    """What could be kept, the recipe's own first, and the coarsest step that the bound allows, in words.

    wanted: temperatures of the recipe's students."""
    pilot, specs = scored.pilot, scored.specs
    signal = pilot.identity.signal
    temperatures = sorted({*TEMPERATURES, *wanted})
    with console.progress(len(specs), "choices", label="plan") as progress:
        options = price_all(pilot, specs, temperatures, lambda: progress.advance(1))
    kept_k = signal.topk.k if signal.topk else usual_k(pilot.identity.vocabulary)
    step = coarsest(options, kept_k, bound, wanted)
    best = cheapest(options, bound, wanted)
    if best and step:  # the table has the steps at one k, and plain
        refined = [spec for spec in stepped(best.spec, step_of(step)) if spec not in specs]
        options += price_all(pilot, refined, temperatures)
    side = side_bytes(pilot)
    if side:
        options = [with_side(option, signal, side) for option in options]
    if signal == side_of(signal):  # and nothing of the output, so it is not among them
        options.insert(0, Option(signal, side, ()))
    return options, _step(step, kept_k, bound, wanted)


def _step(found: Option | None, k: int, bound: Bound, temperatures: Seq[float]) -> str:
    """The largest step of a nat that the bound on the KL added allows, in words, with what it adds at the most."""
    if bound.max_kl_added is None:
        return "any: fidelity.max_kl_added is null"
    tried = ", ".join(str(Fraction(step)) for step in STEPS)
    if found is None:
        return f"none of {tried} adds at most fidelity.max_kl_added = {bound.max_kl_added:g}; null, float32, adds none"
    added = max(row.kl_added_nats or 0.0 for row in found.rows if row.temperature in temperatures)
    return (
        f"{Fraction(step_of(found))} of {tried}: at k = {k} it adds {added:.2g} nats, of fidelity.max_kl_added = "
        f"{bound.max_kl_added:g}"
    )


def _lines(option: Option, bound: Bound, tokens: int, hours: float) -> list[dict[str, Any]]:
    """One line per temperature."""
    return [
        {
            "keeps": option.spec.in_words(),
            "temperature": row.temperature,
            "retained_mass": round(row.retained_mass, 4),
            "kl_added": None if row.kl_added_nats is None else float(f"{row.kl_added_nats:.2g}"),
            "gradient_angle_deg": round(row.gradient_angle_deg, 2),
            "gradient_norm_ratio": round(row.gradient_norm_ratio, 3),
            "within_bound": not bound.misses(row),
            "bytes_per_token": round(option.bytes_per_token, 1),
            "corpus_bytes": round(option.bytes_per_token * tokens),
            "teacher_hours": round(hours, 4),
        }
        for row in option.rows
    ]


def _head(teacher: Any, console: Console, *, needed: bool) -> tuple[bytes, Any] | None:
    """The output head as bytes and as it is, or None where this architecture has none that can be stored; raises
    TeacherError then if the recipe's own signal needs it."""
    from stillroom.workers.head import head_bytes

    try:
        head = teacher.output_head()
    except TeacherError as error:
        if needed:
            raise
        console.notice(f"plan: {error}")
        return None
    return head_bytes(head), head


def _calibrations(head: Any, signals: Seq[Signal]) -> dict[str, Calibration]:
    from stillroom.workers.head import calibrate, steps_of

    hidden = np.concatenate([s.hidden for s in signals if s.hidden is not None])
    return {"int16": steps_of(head), "int8": calibrate(hidden, head.weight.float().cpu().numpy())}


def _sample(plan: Plan, manifest: Manifest) -> list[Sequence]:
    """The first sequences of the plan, which are a random sample of the corpus: units are made by digest."""
    chosen: list[int] = []
    tokens = 0
    for unit in plan.pending:
        for digest, length in zip(unit.sequences, unit.tokens, strict=True):
            if chosen and tokens + length > PILOT_TOKENS:
                return [row.sequence for row in manifest.rows(chosen)]
            chosen.append(plan.rows[digest])
            tokens += length
    return [row.sequence for row in manifest.rows(chosen)]
