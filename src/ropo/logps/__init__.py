"""From tokens to log-probs: `batch` (tensors), `forward`, `shared_prefix` (models), `features`, `score`, `cache`."""
