"""Readers, transforms, samplers and collation of detection data."""

import util  # noqa: F401  before torch
