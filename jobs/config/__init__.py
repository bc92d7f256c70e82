"""The settings of a run: command line over recipe over preset over default."""
