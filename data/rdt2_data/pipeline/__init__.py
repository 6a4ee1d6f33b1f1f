"""From shards to batches: a stream that is a pure function of its configuration and a position."""
