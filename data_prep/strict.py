"""The base of every settings class of data preparation. Knows nothing of any setting."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Settings that never change once they are made; an unknown key is refused.

    >>> class Size(Strict):
    ...     height: int
    >>> Size(hieght=64)
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 2 validation errors for Size
    ...
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
