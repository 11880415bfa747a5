"""The strict, frozen base of every config section."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A config section: unknown keys are errors, values never change after parsing."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    operational: ClassVar[frozenset[str]] = frozenset()
    """Keys that change no result: another value makes no stage stale."""

    def result_part(self) -> dict[str, Any]:
        """The section as plain JSON values, without what changes no result."""
        plain = self.model_dump(mode="json", exclude=set(self.operational))
        for name in plain:
            value = getattr(self, name)
            if isinstance(value, Section):
                plain[name] = value.result_part()
        return plain
