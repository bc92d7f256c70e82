"""Makes counting.py importable, here and in the workers (which search what their driver searches)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
