"""Tensors in, tensors out; batch dimensions lead. Matrices are ``(..., out, in)``."""

from orthokit.linalg.adviser import MapChoice, map_products, recommended_map
from orthokit.linalg.block_diagonal import apply_blocks, block_diagonal, block_sizes, rotate_blocks
from orthokit.linalg.butterfly import apply_butterfly, butterfly_depth, butterfly_matrix, butterfly_permutation
from orthokit.linalg.coefficients import COEFFICIENTS, coefficient_table
from orthokit.linalg.laws import (
    expected_generator_norm,
    expected_log_drift,
    leading_law,
    orthogonality_error,
    plane_singular_values,
    polished_bounds,
)
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
from orthokit.linalg.minimax import landing_interval, minimax_quintic, minimax_table
from orthokit.linalg.permutations import inverse_permutation, permute, random_permutation
from orthokit.linalg.polar import METHODS, orthogonalize, polar, procrustes, singular_value_map
from orthokit.linalg.randoms import random_orthogonal
from orthokit.linalg.skew import pack_skew, packed_size, skew_part, unpack_skew
from orthokit.linalg.spectra import singular_values, top_singular_value

__all__ = [
    "COEFFICIENTS",
    "MAPS",
    "METHODS",
    "MapChoice",
    "apply_blocks",
    "apply_butterfly",
    "block_diagonal",
    "block_sizes",
    "butterfly_depth",
    "butterfly_matrix",
    "butterfly_permutation",
    "cayley",
    "cayley_neumann",
    "coefficient_table",
    "exp",
    "exp_taylor",
    "expected_generator_norm",
    "expected_log_drift",
    "inverse_cayley",
    "inverse_permutation",
    "landing_interval",
    "leading_law",
    "map_products",
    "matrix_polynomial",
    "minimax_quintic",
    "minimax_table",
    "orthogonality_error",
    "orthogonalize",
    "pack_skew",
    "packed_size",
    "permute",
    "plane_singular_values",
    "polar",
    "polish_orthogonal",
    "polished_bounds",
    "procrustes",
    "random_orthogonal",
    "random_permutation",
    "recommended_map",
    "rotate_blocks",
    "singular_value_bounds",
    "singular_value_map",
    "singular_values",
    "skew_part",
    "top_singular_value",
    "unpack_skew",
]
