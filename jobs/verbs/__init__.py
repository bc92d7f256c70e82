"""One file a verb of the command `moray`: its options, in its words. Each imports its work when it is asked for."""
