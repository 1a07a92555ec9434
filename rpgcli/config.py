"""The base of every configuration class: frozen, typed, unknown keys forbidden.

A configuration lies beside the class that it configures and builds it; `recipe.py` composes them. A `kind` literal
makes the union of a plural folder.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen settings; the docstring under a field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
