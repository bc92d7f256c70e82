"""How a run ends, in a number: the same under every launcher."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_MISTAKE = 2  # a person's, in what was asked for
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, the same command resumes
EXIT_SUPERSEDED = 76  # another attempt took over, and this one has written nothing since
EXIT_KILLED_BY_KEYBOARD = 130
