"""Lottery-ticket sparse fine-tuning: select the entries that matter, tune only those, add the
differences up.

theta0 = sf.snapshot(model)
support = sf.select(model, theta0, density=0.028)
optimizer = sf.MaskedAdamW(model, support, theta0, lr=5e-5)
delta = optimizer.delta()
with sf.compose(model, [language, task], heads=task): ...
"""

from . import ops
from ._version import __version__
from .checkpoints import diff, export
from .compose import Composition, compose
from .delta import SFTError, SparseDelta
from .families import decouple_output_embeddings, freeze_norms
from .loop import Length, Loop
from .lottery import LotteryTicket, TrainingDiverged
from .merge import merge
from .optim import MaskedAdamW
from .overlap import overlap
from .registry import DeltaRegistry
from .select import select
from .snapshot import Snapshot, snapshot
from .sources import MultiSource
from .tiles import Layout, Support

__all__ = [
    "Composition",
    "DeltaRegistry",
    "Layout",
    "Length",
    "Loop",
    "LotteryTicket",
    "MaskedAdamW",
    "MultiSource",
    "SFTError",
    "Snapshot",
    "SparseDelta",
    "Support",
    "TrainingDiverged",
    "__version__",
    "compose",
    "decouple_output_embeddings",
    "diff",
    "export",
    "freeze_norms",
    "merge",
    "ops",
    "overlap",
    "select",
    "snapshot",
]
