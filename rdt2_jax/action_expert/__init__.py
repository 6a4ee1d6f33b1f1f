"""RDT, the action expert of RDT2: a transformer that turns noise into a chunk of actions by flow matching.

It reads keys and values of the first backbone layers. Functions of (params, config, inputs); start with
`model.velocity` and `flow.sample`.
"""
