"""What transformers are made of: linear maps, norms, rotary embeddings, attention, stacks of layers.

Functions of (params, inputs); the backbone and the action expert share them.
"""
