"""A whole run: read the data, audit, train round by round, evaluate, write the output folder."""
