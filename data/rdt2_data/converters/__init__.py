"""Recordings of other projects, and of our own executor, turned into shards: `rdt2 data convert`."""
