"""Tensors in, tensors out; batch dimensions lead. Matrices are ``(..., out, in)``."""

from orthokit.linalg.coefficients import COEFFICIENTS, coefficient_table
from orthokit.linalg.polar import METHODS, orthogonalize, polar, procrustes, singular_value_map
from orthokit.linalg.randoms import random_orthogonal
from orthokit.linalg.spectra import singular_values, top_singular_value

__all__ = [
    "COEFFICIENTS",
    "METHODS",
    "coefficient_table",
    "orthogonalize",
    "polar",
    "procrustes",
    "random_orthogonal",
    "singular_value_map",
    "singular_values",
    "top_singular_value",
]
