"""Models that learn what people, rules or rewards prefer."""
