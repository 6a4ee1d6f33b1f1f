"""Published weights: `table` says which tensor fills which leaf, `ops` how, `loader` reads and writes.

Beside them, one table per published model.
"""
