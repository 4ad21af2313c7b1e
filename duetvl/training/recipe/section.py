"""What the sections of a recipe have in common."""

from __future__ import annotations

import os.path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a directory named `~` is nobody's intention


def contradiction(message: str) -> PydanticCustomError:
    """An error about several fields together, which names them itself."""
    return PydanticCustomError("contradiction", "{message}", {"message": message})


class Section(BaseModel):
    """A part of a recipe: typed strictly, without other fields, unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def as_tuple(value: Any) -> Any:
    """A list as a tuple: lists are what YAML has, and a recipe is unchangeable."""
    return tuple(value) if isinstance(value, list) else value


def one_or_more(value: Any) -> Any:
    """`x` stands for `[x]`, and null for `[]`."""
    return () if value is None else (value,) if isinstance(value, str) else as_tuple(value)
