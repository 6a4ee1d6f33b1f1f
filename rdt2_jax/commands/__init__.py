"""Sub-commands of `rdt2` that belong to the model. Modules here import nothing heavy at the top."""
