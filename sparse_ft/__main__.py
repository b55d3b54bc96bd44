"""`python -m sparse_ft`: the command `sparse-ft`."""

from sparse_ft.cli import main

main()
