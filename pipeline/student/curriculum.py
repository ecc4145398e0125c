"""The phases of a run, and the values of each of its steps.

Enters: a `StudentConfig` and the number of steps. Leaves: a `Stage` for each phase, and `Values` of a step. Costs:
nothing; pure functions of the step, so a resumed run has nothing to restore.

    stages(config, total_steps) ─► stage_of(stages, step) ─► stage.values(step)

Schedules of a phase run over its own steps (the chapter, §7.2: output only, add hidden states, lower temperature,
fine-tuning). The learning rate runs over all steps of the phases that share it: until one states an `lr` of its own.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.features.config import FeaturesConfig
from stillroom.pipeline.student.losses_config import LossConfig
from stillroom.pipeline.student.schedules import Ramp, at, learning_rate, shown
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Values:
    """What a step is done with. weights: of the feature losses, by name, output: of the output losses; 0 among them are
    left out."""

    alpha: float
    temperature: float
    lr: float
    weights: dict[str, float]
    output: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A phase. number: from 0. first: its first step, from 0. rate: (first step, steps, peak) of its learning rate."""

    number: int
    first: int
    steps: int
    losses: LossConfig
    features: FeaturesConfig | None
    rate: tuple[int, int, float]

    def values(self, step: int, config: StudentConfig) -> Values:
        """At step `step` of the run, from 0, which lies in this phase."""
        within = step - self.first
        assert 0 <= within < self.steps, (step, self.first, self.steps)
        begun, span, peak = self.rate
        parts = self.features.parts() if self.features else {}
        weights = {name: at(part.weight, within, self.steps) for name, part in parts.items()}
        return Values(
            alpha=at(self.losses.alpha, within, self.steps),
            temperature=at(self.losses.temperature, within, self.steps),
            lr=learning_rate(
                step - begun, total_steps=span, peak=peak, warmup_steps=config.warmup_steps,
                schedule=config.schedule, min_ratio=config.min_lr_ratio,
            ),
            weights={name: weight for name, weight in weights.items() if weight > 0},
            output=self.losses.output.weights(within, self.steps) if self.losses.distils else {},
        )  # fmt: skip


def phase_steps(config: StudentConfig) -> int | None:
    """Steps of all phases; None where there are none."""
    return sum(phase.steps for phase in config.phases) if config.phases else None


def stages(config: StudentConfig, total_steps: int) -> list[Stage]:
    """One for each phase, or one for the whole run; `total_steps` in all."""
    if not config.phases:
        return [
            Stage(
                number=0, first=0, steps=total_steps, losses=config.losses, features=config.phase_features()[0],
                rate=(0, total_steps, config.lr),
            )
        ]  # fmt: skip
    assert phase_steps(config) == total_steps
    starts = [0, *accumulate(phase.steps for phase in config.phases)]
    # Where a learning rate begins: with the first phase, and with each that states one.
    begins = [0, *(number for number, phase in enumerate(config.phases) if number and phase.lr is not None)]
    found = []
    settings = zip(config.phases, config.all_losses(), config.phase_features(), strict=True)
    for number, (phase, losses, features) in enumerate(settings):
        begin = max(b for b in begins if b <= number)
        end = min([b for b in begins if b > number], default=len(config.phases))
        found.append(
            Stage(
                number=number, first=starts[number], steps=phase.steps, losses=losses,
                features=features,
                rate=(starts[begin], starts[end] - starts[begin], config.phases[begin].lr or config.lr),
            )
        )  # fmt: skip
    return found


def cut_short(config: StudentConfig, total_steps: int) -> list[str]:
    """Notices of schedules whose `steps` are more than their phase or the run has: they never reach their `to`."""
    phases = stages(config, total_steps)
    shares = config.mix.shares if config.mix else {}
    found = [("this run", total_steps, f"mix.shares.{name}", share) for name, share in shares.items()]
    for phase in phases:
        values = {
            f"features.{n}.weight": p.weight for n, p in (phase.features.parts() if phase.features else {}).items()
        }
        if phase.losses.distils:
            values |= {"losses.alpha": phase.losses.alpha, "losses.temperature": phase.losses.temperature}
            values |= {f"losses.output.{name}": weight for name, weight in phase.losses.output.named().items()}
        of = f"phase {phase.number}" if len(phases) > 1 else "this run"
        found += [(of, phase.steps, name, value) for name, value in values.items()]
    return [
        f"{name} goes {shown(value)} in {value.steps} steps, but {of} has {steps}: it ends at "
        f"{value.at(steps - 1, steps):.4g} (leave its steps out for a schedule that ends with them)"
        for of, steps, name, value in found
        if isinstance(value, Ramp) and value.start != value.end and (value.steps or 0) > steps
    ]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Steps first … stop − 1 that read one corpus: None for the run's own. before: steps that read it earlier."""

    first: int
    stop: int
    corpus: Path | None
    before: int


def span_of(config: StudentConfig, total_steps: int, step: int) -> Span:
    """The steps around `step`, from 0, for which one stream is open. Each corpus goes on where it was left."""
    found: list[Span] = []
    read: dict[Path | None, int] = {}
    for number, stage in enumerate(stages(config, total_steps)):
        corpus = config.phases[number].corpus if config.phases else None
        begin, end = stage.first, stage.first + stage.steps
        if found and found[-1].corpus == corpus:
            found[-1] = replace(found[-1], stop=end)
        else:
            found.append(Span(first=begin, stop=end, corpus=corpus, before=read.get(corpus, 0)))
        read[corpus] = read.get(corpus, 0) + stage.steps
    return next(span for span in found if step < span.stop)


def stage_of(stages: Seq[Stage], step: int) -> Stage:
    """The phase in which a step lies, from 0."""
    return next(stage for stage in reversed(stages) if stage.first <= step)


def other_corpus(path: Path, manifest: Manifest, window: int) -> Manifest:
    """The corpus of a phase. Raises StudentError if it does not go with the run's own: another tokenizer, or sequences
    that do not fit the window."""
    other = Manifest.open(path)
    if other.meta.tokenizer != manifest.meta.tokenizer:
        raise StudentError(
            f"phase corpus {path} was tokenised by {other.meta.tokenizer}, the run's by {manifest.meta.tokenizer}: "
            "ingest it with this recipe's teacher"
        )
    longest = int(other.index().tokens.max())
    if longest > window:
        raise StudentError(
            f"phase corpus {path} has sequences of {longest} tokens, the student's window is {window}: ingest it with "
            f"corpus.window {window}"
        )
    return other
