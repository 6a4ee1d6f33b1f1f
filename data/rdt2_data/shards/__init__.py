"""Samples in archives: the published tar shards and ArrayRecord, written, indexed and read at random."""
