"""Training data: what chunks and shards are made of, and where they come from."""
