"""Generated text that must match a JSON schema, a regular expression, a list of choices or a grammar."""

from nanoflax.constraints.constraint import Constraint

__all__ = ["Constraint"]
