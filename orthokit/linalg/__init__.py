"""Tensors in, tensors out; batch dimensions lead. Matrices are ``(..., out, in)``."""

from orthokit.linalg.coefficients import COEFFICIENTS, coefficient_table
from orthokit.linalg.maps import (
    MAPS,
    cayley,
    cayley_neumann,
    exp,
    exp_taylor,
    inverse_cayley,
    matrix_polynomial,
    polish_orthogonal,
    singular_value_bounds,
)
from orthokit.linalg.polar import METHODS, orthogonalize, polar, procrustes, singular_value_map
from orthokit.linalg.randoms import random_orthogonal
from orthokit.linalg.skew import pack_skew, packed_size, skew_part, unpack_skew
from orthokit.linalg.spectra import singular_values, top_singular_value

__all__ = [
    "COEFFICIENTS",
    "MAPS",
    "METHODS",
    "cayley",
    "cayley_neumann",
    "coefficient_table",
    "exp",
    "exp_taylor",
    "inverse_cayley",
    "matrix_polynomial",
    "orthogonalize",
    "pack_skew",
    "packed_size",
    "polar",
    "polish_orthogonal",
    "procrustes",
    "random_orthogonal",
    "singular_value_bounds",
    "singular_value_map",
    "singular_values",
    "skew_part",
    "top_singular_value",
    "unpack_skew",
]
