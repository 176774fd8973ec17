"""One training stage: the trainer, its dataset and callbacks, and what is checked before it starts."""
