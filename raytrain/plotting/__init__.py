"""Figures of sweeps as PNG and SVG."""
