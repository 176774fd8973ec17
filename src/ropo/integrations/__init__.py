"""Trainers of other libraries on audited labels; a module is imported by name, since it needs its library."""
