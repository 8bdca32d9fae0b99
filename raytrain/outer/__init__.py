"""Outer updates: the weights at which the gradient is measured, and its application."""

from raytrain.outer.awp import Awp
from raytrain.outer.base import OUTERS, AbstractOuter, Outer
from raytrain.outer.clip import Clip
from raytrain.outer.engm import Engm
from raytrain.outer.plain import Plain
from raytrain.outer.sam import Sam

OUTERS.register(Plain, Clip, Engm, Awp, Sam)

__all__ = ["OUTERS", "AbstractOuter", "Awp", "Clip", "Engm", "Outer", "Plain", "Sam"]
