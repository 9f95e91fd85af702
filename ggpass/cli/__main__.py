"""`python -m ggpass.cli`: the command line without its script."""

from ggpass.cli import main

main()
