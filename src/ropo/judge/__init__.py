"""Outside judges, which say which of two responses is better: `verdicts` asks one, `make` makes it from options."""
