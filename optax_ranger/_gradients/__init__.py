"""The engine: the gradient of a batch through a step over per-example gradients.

Imports `_core`. It knows no step: a step is whatever follows Optax's protocol.
"""
