"""`python -m moray` is the command `moray`."""

from moray.jobs.cli import main

main()
