"""OpenAI-compatible servers: `address` checks where requests may go, `client` sends one, `pool` sends many."""
