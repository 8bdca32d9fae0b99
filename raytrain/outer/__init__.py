"""Where the weight gradient is measured and how it is applied."""

from raytrain.outer.plain import AbstractOuter, Outer, Plain

__all__ = ["AbstractOuter", "Outer", "Plain"]
