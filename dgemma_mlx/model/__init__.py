"""The network: tensors in, tensors out. Shape letters used in all comments:

B batch, P prefix (prompt and committed canvases), L positions of a call, C canvas, H query heads,
Hk key/value heads, D head dim, M hidden, I intermediate, V vocabulary, E experts, K experts per token,
W sliding window.
"""
