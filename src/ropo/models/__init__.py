"""Where weights come from: model folders and hub ids, tokenizers, adapters, and the reference's log-probabilities."""
