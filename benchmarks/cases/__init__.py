"""The cases, by what they measure. Importing this registers them all in case.RECIPES."""

from . import composition, files, optimizer, selection, support, training  # noqa: F401
