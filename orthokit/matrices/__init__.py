r"""One notion of "the matrices of a model".

:func:`matrices` says which parameters are matrices, how each is seen as a (batch of) ``out x in`` block(s), and why the
rest is left out. Optimizers update these blocks, diagnostics measure them, and tables name them.
"""

from orthokit.matrices.build import matrices
from orthokit.matrices.table import LeftOut, MatrixBlock, MatrixTable

__all__ = ["LeftOut", "MatrixBlock", "MatrixTable", "matrices"]
