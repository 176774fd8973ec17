"""What knows nothing of preferences: folder locks, signals, option types, HTTP endpoints."""
