"""The base of a student's sections in a recipe.

Enters, leaves, costs: nothing. A module of its own, for the sections lie in several files.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, without unknown keys; the docstring under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
    )
