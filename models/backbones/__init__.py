"""Backbones: images to feature maps, behind one contract."""

from models.backbones import timm_features, torchvision_resnet
from models.backbones.joiner import Joiner
from models.backbones.registry import Backbone, create_backbone

__all__ = ["Backbone", "Joiner", "create_backbone", "timm_features", "torchvision_resnet"]
