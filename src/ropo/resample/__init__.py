"""New pairs for the prompts of dropped pairs: sample candidates, choose by margin (ROPO, section 3.3)."""
