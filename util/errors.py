"""User errors: printed as one line, exit code 2."""

import difflib
import errno
import reprlib
import traceback
from collections.abc import Collection
from typing import Any

EXIT_USER_ERROR = 2
_TOO_MANY_SIZES = ("FailOnRecompileLimitHit", "RecompileLimitExceeded")  # by version of PyTorch
_LIKE = 0.75  # difflib's measure: one letter of four may differ
_MAX_WORDS = 30
_DISK_ERRORS = {  # what the user can do about each
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free space or choose another `output_dir`"
    ),
    errno.EIO: "Check the disk or choose another `output_dir`",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "Change its permissions or choose another `output_dir`",
    ),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.ELOOP), "Choose another `output_dir`"),
    errno.ENAMETOOLONG: "Shorten the name or choose another `output_dir`",
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE),
        "Raise the limit of open files (`ulimit -n`) or lower `num_workers`",
    ),
}


class UserError(Exception):
    """A mistake of the user: the message says where it is, what is wrong and what to do.

    It names an option in backticks and without dashes; the command line shows it as a flag.
    """


class ConfigError(UserError):
    """An option has an unknown name or a value out of range.

    The message may begin with an option without backticks, as in `name:` or `name value:`, and so
    never begins with a word of the user's, such as a path.
    """


class DataError(UserError):
    """A data set cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint is damaged, foreign, or does not fit the model."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def brief(value: Any) -> str:
    """Return what a value of a file is, in 80 characters or so, however large it is."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return f"a {type(value).__name__} of very many digits"


def nearest_hint(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """Return a sentence with the known word closest to `name`, else `otherwise` or the words.

    Only typing mistakes are corrected: a word that merely looks similar would mislead.
    """
    words = {word.lstrip("-"): word for word in known}  # the dashes of flags are no likeness
    close = difflib.get_close_matches(name.lstrip("-"), words, n=1, cutoff=_LIKE)
    if close:
        return f"Did you mean '{words[close[0]]}'?"
    shown = ", ".join(sorted(known)[:_MAX_WORDS])
    more = f", ... ({len(known)})" if len(known) > _MAX_WORDS else ""
    return otherwise or f"Known: {shown}{more}."


def in_one_line(error: Exception) -> str | None:
    """Return what a user can fix in one line; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        what_to_do = _DISK_ERRORS[error.errno]
        return f"{error.filename or 'output'}: cannot be used: {error.strerror}. {what_to_do}."
    operation, found, _ = str(error).partition(" does not have a deterministic implementation")
    if isinstance(error, RuntimeError) and found:
        return (
            f"deterministic: PyTorch has no deterministic {operation[-80:]} on this device. Leave "
            "`deterministic` out, or the option that needs it."
        )
    if type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
        return _not_compiled(error)
    first: BaseException | None = error
    while first is not None:  # it comes as a signal, and what it interrupts may fail in its turn
        if _loader_ended(first):
            return (
                f"data loading: {' '.join(str(first).split())} The system probably ran out of "
                "memory: lower `num_workers`, and continue with `resume auto`."
            )
        first = first.__context__
    return None


def _not_compiled(error: Exception) -> str:
    if type(error).__name__ in _TOO_MANY_SIZES:
        return (
            "compile: batches come in too many sizes. Give `pad_multiple` 128 to round them up, "
            "or leave `compile` out."
        )
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
    return (
        f"compile: PyTorch could not compile the model: {reason[:200].rstrip('.')}. Leave "
        "`compile` out, or try another PyTorch or C++ compiler; `debug` shows where it failed."
    )


def _loader_ended(error: BaseException) -> bool:
    """Return whether a loader process was killed: while it worked, or handed a batch over."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    frames = traceback.walk_tb(error.__traceback__)
    names = {frame.f_globals.get("__name__") for frame, _ in frames}
    broken = isinstance(error, (ConnectionError, EOFError))
    return broken and "torch.utils.data.dataloader" in names
