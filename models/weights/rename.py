"""Other names for the modules of a state dict."""

import re
from collections.abc import Callable, Mapping


def renamer(modules: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that renames a key by the first module it lies in; # is one number.

    It raises ValueError for a key that lies in none.
    """
    rules = [
        (re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), new.replace("#", r"\1"))
        for old, new in modules.items()
    ]

    def rename(key: str) -> str:
        for pattern, replacement in rules:
            if pattern.match(key):
                return pattern.sub(replacement, key, count=1)
        raise ValueError(f"'{key}' is not a key of the model")

    return rename
