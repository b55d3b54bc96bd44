"""`python -m sparse_ft_kernels`: which backend serves which op here, and why the others do not."""

import contextlib
import os
import sys

import torch

from . import native
from .dispatch import ENVIRONMENT, explain


def main() -> None:
    library, reason = native.load()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"cpu library: {'' if library is not None else 'not available: '}{reason}")
    print(f"{ENVIRONMENT}: {os.environ.get(ENVIRONMENT) or 'not set'}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        rows = explain(device)
        width = max(len(op) for op, _, _ in rows)
        print(f"\n{device}")
        for op, backend, state in rows:
            print(f"  {op:<{width}}  {backend:<9}  {state}")


if __name__ == "__main__":
    # A reader that stops early, such as `| head`, is no error.
    with contextlib.suppress(BrokenPipeError):
        main()
        sys.stdout.flush()
