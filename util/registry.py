"""Things that are chosen by name, each in a file that is imported when it is first asked for."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

from util.errors import ConfigError, nearest_hint

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries of one kind by name.

    `modules` says where a name is registered: a module name that starts with a dot is relative to
    `package`. To add an entry, write a file that calls `register` and add its line to `modules`.
    """

    def __init__(self, kind: str, package: str | None, modules: Mapping[str, str]) -> None:
        self.kind, self.package = kind, package
        self.modules = dict(modules)
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds an entry under a name."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is already registered")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Return an entry; import its module if that has not happened yet.

        Raises:
            ConfigError: there is none of this name, or its module does not register it.
        """
        if name not in self._entries and name in self.modules:
            module = import_module(self.modules[name], self.package)
            if name not in self._entries:
                raise ConfigError(
                    f"{self.kind} {name}: {module.__file__} registers no such name. "
                    f"Call `register` there with '{name}'."
                )
        if name not in self._entries:
            raise ConfigError(f"{self.kind} {name}: does not exist. {nearest_hint(name, [*self])}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, without importing anything."""
        return iter(sorted({*self.modules, *self._entries}))
