"""The type checker that the import hook applies: integers count as floats, as in Python's numeric tower."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
