"""How trials are run: the rounds of the server, messages, processes, launchers, progress."""
