"""What a recipe says of one phase of a curriculum.

Enters: a recipe's mapping. Leaves: a frozen pydantic model. Costs: nothing; no torch.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from stillroom.pipeline.student.features.config import FeaturesConfig
from stillroom.pipeline.student.losses_config import LossConfig
from stillroom.pipeline.student.schedules import Scheduled, Value
from stillroom.pipeline.student.section import Section as _Config


class PhaseConfig(_Config):
    """One part of a curriculum. What it leaves out is as the student says."""

    steps: int = Field(ge=1)
    """Optimizer steps."""

    losses: LossConfig | None = None
    """In place of the student's `losses`, as a whole. null: the student's."""

    temperature: Scheduled | None = None
    """In place of the temperature alone."""

    features: FeaturesConfig | Literal["none"] | None = None
    """In place of the student's `features`, as a whole. none: no feature losses. null: the student's."""

    corpus: Path | None = None
    """The `corpus.parquet` of another recipe with the same tokenizer, for fine-tuning on its text. It has no signal, so
    losses.alpha must be 0 and features none. null: the recipe's own corpus."""

    lr: float | None = Field(default=None, gt=0.0)
    """A peak learning rate: its warm-up and decay begin anew with this phase, and last until another that has one.
    null: the decay of the phase before goes on."""

    @field_validator("temperature")
    @classmethod
    def _on_the_grid(cls, temperature: Value | None) -> Value | None:
        return None if temperature is None else LossConfig(temperature=temperature).temperature
