"""`python -m jobs` is the command `moray`."""

from jobs.cli import main

main()
