"""Backbones: images to feature maps, behind one contract."""

from models.backbones import resnet, timm_model
from models.backbones.joiner import Joiner
from models.backbones.registry import Backbone, create_backbone

__all__ = ["Backbone", "Joiner", "create_backbone", "resnet", "timm_model"]
