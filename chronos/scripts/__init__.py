"""Documented entry points, run with ``python -m``."""
