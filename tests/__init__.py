import util  # noqa: F401  before torch
