"""The RVQ action tokenizer: a chunk of 24 x 20 numbers <-> 27 tokens.

`tokenizer` has the pure functions `encode` and `decode`, `training` has `loss` and `train_step`, `checkpoint` reads
and writes the published layout, `report` says whether a tokenizer fits a set of actions, `vocabulary` maps tokens to
language-model ids.
"""
