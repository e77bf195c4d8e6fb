"""The model family and its summary table."""

from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .summary import summary

__all__ = ["ResNet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "summary"]
