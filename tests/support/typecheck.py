"""The run-time type checker of the test suite: beartype, with an int allowed where a float is asked for."""

from beartype import BeartypeConf, beartype

# PEP 484's numeric tower: Muon(lr=1) is right, and jaxtyping's default of refusing it would test nothing.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
