"""Compare methods on noise whose truth is known: tasks with a gold reward, kinds of noise, methods, a grid of cells."""
