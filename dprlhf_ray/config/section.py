"""The base of every section of a config."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """true is not the number 1."""
        annotation = str(cls.model_fields[info.field_name].annotation) if info.field_name else ""
        parts = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, dict):
            parts = list(value.values()) if annotation.startswith("dict") else []  # a section checks its own
        for part in parts if "bool" not in annotation else ():
            if isinstance(part, bool):
                raise ValueError(f"should not be {str(part).lower()}")
        return value
