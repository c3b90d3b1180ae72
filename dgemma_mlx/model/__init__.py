"""The text network of DiffusionGemma: arrays in, arrays out, without any text processing or sampling.

Docstrings and comments in ``model`` and ``kernels`` give array shapes with these letters:

* B: batch rows
* L: positions in one call
* P: prefix positions (the prompt and the committed canvases)
* C: canvas positions
* S: positions that a query can attend to (prefix and canvas)
* H: query heads
* Hk: key/value heads
* D: values per head
* M: hidden size
* I, O: inputs and outputs of a linear layer
* V: vocabulary size
* N: rows, with batch and positions flattened into one axis
* E: experts
* K: experts per token
"""
