"""Outside judges, which say which of two responses is better: `verdicts` asks one, `options` makes it."""
