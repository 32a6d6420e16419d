"""How a step changes the weights, each worker its own shards.

    optim.py            START HERE: AdamW, learning rate, averaged weights, the rule that skips
    muon.py             orthogonalised momentum for the matrices inside the layers
    sharded.py          a worker's part of a tensor, and that part dressed as the whole

Know nothing of losses or files.
"""
