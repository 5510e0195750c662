"""Readers, transforms, samplers and collation of detection data."""
