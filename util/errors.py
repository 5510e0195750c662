"""Errors that are the user's to mend, told in one line."""

import difflib
from collections.abc import Collection


class UserError(Exception):
    """A mistake of the user, told as `place: expected X, got Y. What to do.`.

    The command line prints the message alone and exits with code 2.
    """


class ConfigError(UserError):
    """An option has an unknown name or a value out of range."""


class DataError(UserError):
    """A data set cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint is damaged, foreign, or does not fit the model."""


def nearest_hint(name: str, known: Collection[str]) -> str:
    """Return a sentence naming the known word closest to `name`, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(known))}."
