"""Models that exist: opened, shown, exported, upcycled."""
