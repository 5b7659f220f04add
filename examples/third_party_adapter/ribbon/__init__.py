"""Ribbon, an invented autoregressive video model."""

from ribbon.model import Memory, RibbonNet, RibbonVideo

__all__ = ["Memory", "RibbonNet", "RibbonVideo"]
