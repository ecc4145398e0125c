"""Advice while a student trains: it does not learn, it is too small for its teacher, it learns its teacher by heart.

Enters: the records of `log.jsonl`, in their order. Leaves: notices, each of one line with its numbers, each kind once
a run. Costs: a few numbers a step. What is said follows from the records alone, so a resumed run, which reads its log
again, says and keeps what the run that was not stopped does.

The three are rows of the chapter's table of pitfalls (§7.4); its remedies are named. It gives no numbers: the
thresholds below are rules of thumb of this program.

  does not learn   at an evaluation MIN_STEPS past the warm-up: the held-out measure is not NO_BETTER lower than before
                   training. The measure is the KL to the teacher, or the perplexity of a student of hard labels.
  capacity gap     after the last step: the held-out KL is above GAP_NATS, and the training loss on the teacher has
                   stopped falling: less than STALLED over the last quarter of the steps, against the quarter before.
                   Mirzadeh et al. 2020 (arXiv 1902.03393): a teacher too large for its student teaches it worse.
  overfits         at an evaluation: the held-out KL is more than RISEN above its lowest before, while the training loss
                   on the teacher is lower than it was there.

Training losses are compared only where phase and temperature are the same, and never under output weights that change
with the step: T² · KL at another T is another number. Held-out KL is at T = 1 always.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

from stillroom.pipeline.student.config import StudentConfig

MIN_STEPS = 50
NO_BETTER = 0.01
GAP_NATS = 0.5
STALLED = 0.01
RISEN = 0.02
#: Steps whose mean is the training loss at an evaluation.
WINDOW = 20


@dataclass(frozen=True)
class _Step:
    number: int
    kd: float | None
    #: What must be equal for two training losses to be compared.
    setting: tuple[Any, ...]
    temperature: float | None
    alpha: float | None
    lr: float


class Watch:
    """Of one run. steps: in all. warmup_steps: of the learning rate. distils: whether the teacher's output is learned.
    steady: whether the weights of the output losses stay.

    notices: given so far, in their order.
    """

    def __init__(self, *, steps: int, warmup_steps: int, distils: bool, steady: bool = True) -> None:
        self._total, self._warmup, self._distils, self._steady = steps, warmup_steps, distils, steady
        self._steps: list[_Step] = []
        self._evaluations: dict[int, dict[str, Any]] = {}
        self._given: dict[str, str] = {}

    @classmethod
    def of(cls, config: StudentConfig, *, steps: int) -> Self:
        outputs = [losses.output for losses in config.all_losses()]
        steady = all(output.weights(0, 2) == output.weights(1, 2) for output in outputs)
        return cls(steps=steps, warmup_steps=config.warmup_steps, distils=config.distils, steady=steady)

    @property
    def notices(self) -> list[str]:
        return list(self._given.values())

    def see(self, record: dict[str, Any]) -> list[str]:
        """A record of the log; returns the notices that it gives rise to."""
        if record["kind"] == "step":
            if not record["skipped"]:
                self._steps.append(_step(record))
            return []
        if record["kind"] != "evaluation":
            return []
        step = record["step"]
        self._evaluations[step] = record
        found = {
            "learns": self._learns_nothing(step),
            "gap": self._capacity_gap(step) if step == self._total else None,
            "overfits": self._overfits(step),
        }
        new = {kind: line for kind, line in found.items() if line is not None and kind not in self._given}
        self._given |= new
        return list(new.values())

    def _learns_nothing(self, step: int) -> str | None:
        if step < self._warmup + MIN_STEPS or 0 not in self._evaluations or not self._steps:
            return None
        taught = self._distils and self._held_out(0, "kl") is not None
        key, name = ("kl", "held-out KL to the teacher") if taught else ("perplexity", "held-out perplexity")
        before, now = self._held_out(0, key), self._held_out(step, key)
        if before is None or now is None or now <= before * (1 - NO_BETTER):
            return None
        last = self._steps[-1]
        named = (("lower losses.temperature", last.temperature), ("raise losses.alpha", last.alpha))
        remedies = "".join(f"{what} (now {value:g}), " for what, value in named if value is not None)
        return (
            f"the student does not learn: {name} {before:.4g} before training, {now:.4g} after {step} steps; "
            f"{remedies if self._distils else ''}or try another lr (now {last.lr:.2g})"
        )

    def _capacity_gap(self, step: int) -> str | None:
        kl, top1 = self._held_out(step, "kl"), self._held_out(step, "top1")
        quarter = self._total // 4
        if kl is None or kl <= GAP_NATS or quarter < WINDOW:
            return None
        then = self._training_loss(step - 2 * quarter, step - quarter)
        now = self._training_loss(step - quarter, step)
        if then is None or now is None or then[1] != now[1] or now[0] < then[0] * (1 - STALLED):
            return None
        agreement = "" if top1 is None else f", top-1 agreement {top1:.1%}"
        return (
            f"large capacity gap: held-out KL {kl:.3f} nats{agreement}, and the loss on the teacher no longer falls "
            f"({then[0]:.4g} → {now[0]:.4g} over the last two quarters of the steps); take a larger student, or "
            "distil in stages, through a teacher of a size between the two"
        )

    def _overfits(self, step: int) -> str | None:
        now = self._held_out(step, "kl")
        before = {
            s: kl for s in self._evaluations if 0 < s < step and (kl := self._held_out(s, "kl")) is not None
        }  # fmt: skip
        if now is None or not before:
            return None
        best = min(before, key=before.__getitem__)
        then, here = self._training_loss(best - WINDOW, best), self._training_loss(step - WINDOW, step)
        if now <= before[best] * (1 + RISEN) or then is None or here is None or then[1] != here[1]:
            return None
        if here[0] >= then[0]:
            return None
        return (
            f"the student overfits its teacher: held-out KL rose from {before[best]:.4g} after {best} steps to "
            f"{now:.4g} after {step}, while the training loss on the teacher fell from {then[0]:.4g} to {here[0]:.4g}; "
            f"train on more text, for fewer epochs, or stop at {best} steps"
        )

    def _held_out(self, step: int, key: str) -> float | None:
        value: float | None = self._evaluations[step].get(key)
        return value

    def _training_loss(self, after: int, to: int) -> tuple[float, tuple[Any, ...]] | None:
        """Mean distillation loss of the steps after … to, and their setting; None where it is not one number's."""
        found = [s for s in self._steps if after < s.number <= to and s.kd is not None]
        if not self._steady or not found or any(s.setting != found[0].setting for s in found):
            return None
        return fmean(s.kd for s in found if s.kd is not None), found[0].setting


def _step(record: dict[str, Any]) -> _Step:
    """Logs of earlier releases have neither phases nor values that change with the step."""
    temperature = record.get("temperature")
    setting = (record.get("phase"), temperature)
    return _Step(record["step"], record["kd"], setting, temperature, record.get("alpha"), record["lr"])
