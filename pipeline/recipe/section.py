"""The base of a recipe's sections.

Enters, leaves, costs: nothing. A module of its own, for the sections lie in several files.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are refused, nothing changes after validation, a docstring under a field documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
