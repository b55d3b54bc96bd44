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
        chosen: dict[str, str] = {}
        others: dict[str, list[str]] = {}
        refused: dict[tuple[str, str], list[str]] = {}
        for op, backend, state in explain(device):
            others.setdefault(op, [])
            if state == "chosen":
                chosen[op] = backend
            elif state == "available":
                others[op].append(backend)
            else:
                refused.setdefault((backend, state), []).append(op)
        width = max(map(len, others))
        print(f"\n{device:<{width + 2}}  serves     could, too")
        for op, rest in others.items():
            print(f"  {op:<{width}}  {chosen.get(op, 'none'):<9}  {', '.join(rest)}".rstrip())
        for (backend, reason), ops in refused.items():
            which = "any op" if len(ops) == len(others) else ", ".join(ops)
            print(f"  {backend} does not serve {which}: {reason}")


if __name__ == "__main__":
    # A reader that stops early, such as `| head`, is no error.
    with contextlib.suppress(BrokenPipeError):
        main()
        sys.stdout.flush()
