"""Deformable DETR and what trains it."""

import util  # noqa: F401  before torch
from models.criterion import SetCriterion
from models.deformable_detr import DeformableDETR
from models.matcher import HungarianMatcher
from models.postprocess import PostProcess

__all__ = ["DeformableDETR", "HungarianMatcher", "PostProcess", "SetCriterion"]
