"""Backbones: images to feature maps, behind one contract."""

from models.backbones.joiner import Joiner
from models.backbones.registry import BACKBONES, Backbone, create_backbone

__all__ = ["BACKBONES", "Backbone", "Joiner", "create_backbone"]
