"""Tasks: data, heads, losses and metrics of language and task SFTs.

`TASKS[name](**options)` is a task. Importing this loads no transformers; using a task does
(`pip install "sparse-ft[tasks]"`).
"""

from . import lm, parsing, qa, sequences, tokens  # noqa: F401  (each registers its tasks)
from .base import TASKS, Task
from .data import DataError, Examples, held_out

__all__ = ["TASKS", "DataError", "Examples", "Task", "held_out"]
