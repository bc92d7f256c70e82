"""Workers on Ray: nodes and their agents, generations of workers, and the supervisor over them."""
