"""Generated text that must match a JSON schema, a regular expression, a list of choices or a grammar."""

from nanoflax.constraints.constraint import MAX_CHARACTERS, Constraint, json_rule

__all__ = ["MAX_CHARACTERS", "Constraint", "json_rule"]
