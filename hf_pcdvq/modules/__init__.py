"""Layers that hold packed tensors."""

from .linear import QuantLinear, parameter_name

__all__ = ["QuantLinear", "parameter_name"]
