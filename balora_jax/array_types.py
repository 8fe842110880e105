"""Names of array types and the legend of dimension letters used in every shape of this package.

======  =====================================================
letter  meaning
======  =====================================================
B       rows of a batch
T       tokens of a sequence
S       cached tokens that a query may attend to
N       tokens or rows that enter a loss (a flattened batch)
D       model width (hidden size)
F       inner width of the MLP
H       query heads
G       key/value heads (groups)
K       width of one head
V       vocabulary entries
C       classes
R       adapter rank
L       stacked layers
======  =====================================================
"""

from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree, Scalar

__all__ = ["Array", "Axes", "Bool", "Float", "Int", "Key", "PRNGKeyArray", "PyTree", "Scalar"]

Axes = tuple[str | None, ...]
"""Logical axes of an array, one for each dimension; None for one that no device splits.

``layers``: what a scan runs over. ``vocabulary``, ``width``, ``heads``, ``inner``: V, D, H·K, F.
``adapter_X``: the axis X of a factor. ``blocks_X``: blocks of the axis X that share a scale.
"""
