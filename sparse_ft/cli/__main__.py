"""`python -m sparse_ft.cli`: the command `sparse-ft`."""

from . import main

main()
