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

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

__all__ = ["Array", "Bool", "Float", "Int", "PRNGKeyArray", "PyTree", "Scalar"]
