"""From tokens to log-probabilities: `batch` (tensors), `forward` and `shared_prefix` (models), `score`, `cache`."""
