"""Somebody else who says which of two responses is better: `verdicts` asks, `make` knows who there is to ask."""
