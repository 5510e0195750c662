"""Exported files: how a detector becomes one, how one is run, and how it is proven."""
