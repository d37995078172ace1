"""How a trial runs: its server, the messages to its client processes, and its checkpoints."""
