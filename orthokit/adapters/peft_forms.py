r"""What PEFT's numbers mean: which release wrote them, and the rotations that it made of them.

PEFT turns rows, ``x -> x S`` with ``S = Diag(S_1, ..., S_k)`` before the frozen weight, and an embedding's looked-up
rows after it. With ``C(Q) = (I + Q) (I - Q)^{-1}`` and ``R_k(Q) = C(Q) (I - Q^{k+1})``:

======================  ============================================================================
releases                ``S`` of an OFT block with stored numbers ``Q``
======================  ============================================================================
to 0.13                 turns outputs; not read
0.14, 0.15              ``C(-Q)``, ``Q`` the skew part of a stored matrix; outputs are scaled as well
0.16 and later, exact   ``C(-Q)``, ``Q`` packed
0.16, 0.17, ``t`` terms ``I + 2 Q + ... + 2 Q^{t-1}``
0.18 and later          ``R_{t-2}(Q)`` for ``t >= 4``; ``R_2`` for 3; ``I + 2 Q`` for 2; ``I`` for 1
======================  ============================================================================

Here ``turn(x) = x f(Q)^T = x f(-Q)``: exact generators are taken as they are, those of a series with the other sign.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from orthokit.adapters._rotation import SkewMap
from orthokit.adapters.oft import OFT
from orthokit.errors import CheckpointError, OptionError

__all__ = ["NeumannSumOFT", "Release", "neumann_terms", "release_of"]


@dataclass(frozen=True)
class _Sum(SkewMap):
    """``I + 2 Q + ... + 2 Q^m``, ``m = terms``: the series cut without the last half term."""

    @property
    def coefficients(self) -> list[float]:
        return [1.0] + [2.0] * self.terms


@dataclass(frozen=True)
class NeumannSumOFT(OFT):
    r"""OFT with the series as PEFT cut it before release 0.18, ``R_i = I + 2 Q + ... + 2 Q^m``, ``m = terms``.

    For adapters that it trained: :class:`~orthokit.adapters.OFT` has no such map, as its singular values go as
    ``1 +- 2 theta^{m+1}`` or ``1 + 2 theta^{m+2}``, two times those of the whole series. Train new ones with OFT.

    Args:
        block_size: As for OFT, like all that follow but ``map``, which is ``"cayley_neumann"``, and ``tolerance``,
            which is ``None``: the adapter was trained with the error of its series.
    """

    kind: ClassVar[str] = "oft_neumann_sum"
    map: str = "cayley_neumann"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map != "cayley_neumann" or self.tolerance is not None:
            raise OptionError(
                "a sum of Neumann's series has map='cayley_neumann' and tolerance=None; take OFT for other maps."
            )

    @property
    def spec(self) -> SkewMap:
        """The map with its length."""
        return _Sum(self.map, self.terms, self.order)


@dataclass(frozen=True)
class Release:
    """Which PEFT wrote a file.

    Args:
        number: Major and minor, as far as known: ``None`` where the file does not tell.
        text: In words.
    """

    number: tuple[int, int] | None
    text: str

    @property
    def half_last_term(self) -> bool:
        """Whether series end in half a term, as since 0.18."""
        return self.number is not None and self.number >= (0, 18)


def release_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, version: str | None = None) -> Release:
    """Which release wrote an adapter: by what the caller says, the config, or the names of the tensors.

    Raises:
        OptionError: ``version`` is no version, or the tensors are not of it.
        CheckpointError: An OFT of a release whose numbers mean something else.
    """
    given = version if version is not None else config.get("peft_version")
    number = _number(str(given)) if given is not None else None
    if version is not None and number is None:
        raise OptionError(f"version is a release of PEFT such as '0.17' or '0.18.1'; got {version!r}.")
    if config.get("peft_type") != "OFT":
        return Release(number, f"PEFT {given}" if given is not None else "PEFT before 0.18")
    dense = any(re.search(r"\.oft_r$", key) for key in tensors)
    if dense and not any(re.search(r"\.oft_s$", key) for key in tensors):
        raise CheckpointError(
            "the adapter is an OFT of PEFT 0.13 or earlier, which turned outputs and merged something else than it "
            "computed; it is not read. Train it again."
        )
    if number is not None and dense != (number < (0, 16)):
        found = "of 0.14 or 0.15 (oft_r, oft_s)" if dense else "of 0.16 or later (oft_R)"
        raise OptionError(f"the tensors are {found}, and version says {given}; leave version out.")
    if number is not None:
        return Release(number, f"PEFT {given}")
    # Configs tell their release since 0.18, so one that does not is older.
    return Release((0, 15), "PEFT 0.14 or 0.15") if dense else Release((0, 17), "PEFT 0.16 or 0.17")


def _number(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def neumann_terms(t: int) -> int | None:
    """``k`` of ``R_k`` for PEFT's ``t`` terms since 0.18; ``None`` where it is no ``R_k``.

    Args:
        t: ``num_cayley_neumann_terms``.

    Returns:
        ``2`` for 3 and 4, ``t - 2`` beyond; ``None`` for 1 and 2.

    Example:
        >>> [neumann_terms(t) for t in (1, 2, 3, 4, 5, 8)]
        [None, None, 2, 2, 3, 6]
    """
    return None if t < 3 else max(2, t - 2)
