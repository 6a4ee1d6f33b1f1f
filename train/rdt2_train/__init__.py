"""Training: one file a stage, on any device mesh."""
