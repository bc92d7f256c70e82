"""How a verb speaks of what went wrong or was passed over."""

import sys


def complain(message: str) -> None:
    print(f"moray: {message}", file=sys.stderr)
