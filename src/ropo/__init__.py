"""Robust preference optimization: align language models on pairs whose labels are partly wrong."""

__version__ = "0.1.0"
