"""Makes by_hand.py and report_page.py importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
