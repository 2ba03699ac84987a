"""Measurements. `python -m bench.run` times the layer beside PyTorch's own, `python -m bench.plot`
draws what it found.
"""

# The words of the results. Whoever only reads results needs neither torch nor the extension.
OURS, PEER = "batchrenorm", "F.batch_norm"
OPS = ("forward", "backward", "inference", "train")
