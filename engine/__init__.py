"""Training, evaluation and the commands."""

import util  # noqa: F401  before torch
