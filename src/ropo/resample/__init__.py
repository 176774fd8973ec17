"""Win back the prompts of discarded pairs: `generate` samples responses, `select` chooses new pairs."""
