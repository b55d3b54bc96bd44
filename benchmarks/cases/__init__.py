"""The cases, by what they measure. Importing this registers them all in case.RECIPES."""

from . import composition, optimizer, selection, support  # noqa: F401
