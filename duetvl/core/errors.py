"""The errors a user can meet. Each message says what was asked, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DuetvlError(Exception):
    """Base of every error that the user can do something about; the command line prints its message alone."""


class BackendError(DuetvlError):
    """A backend or device is unknown, not installed, or cannot do what is asked."""


class ConfigError(DuetvlError):
    """A recipe, a model configuration or an argument does not make sense."""


class CheckpointError(DuetvlError):
    """Weights or a training checkpoint are missing, damaged, or belong to another model."""


class DataError(DuetvlError):
    """A record, an image or a sample cannot be used."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `"; did you mean 'lr'? (betas, lr, schedule)"`, or all names where none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"; did you mean {near[0]!r}? ({listed})" if near else f"; there are {listed}"
