"""User errors: printed as one line, exit code 2."""

import difflib
from collections.abc import Collection

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake of the user: the message says where it is, what is wrong and what to do.

    It names an option without dashes, and the command line turns into a flag what can be no other
    word: a name that contains an underscore, one at the beginning as in `name:` or `name value:`,
    and one in backticks.
    """


class ConfigError(UserError):
    """An option has an unknown name or a value out of range."""


class DataError(UserError):
    """A data set cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint is damaged, foreign, or does not fit the model."""


def nearest_hint(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """Return a sentence with the known word closest to `name`, else `otherwise` or all words."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"Did you mean '{close[0]}'?"
    return otherwise or f"Known: {', '.join(sorted(known))}."
