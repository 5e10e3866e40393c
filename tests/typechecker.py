"""The checker of annotations in the tests: beartype, where `float` takes an int as it does in Python's typing."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
