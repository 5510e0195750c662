"""What goes wrong in finding or building a backend."""


class BackendError(RuntimeError):
    """A backend cannot be built or cannot run here; the message is one line that says why."""
