"""Measure against truth: `measures` (numbers from known answers), `policy` (a model on a task with a gold reward)."""
