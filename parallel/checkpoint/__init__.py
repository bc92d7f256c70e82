"""Commits: written by any layout while it trains on, whole or not there, read by any other."""
