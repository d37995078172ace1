"""Local training, evaluation and the record of both. Nothing here knows of processes or sockets."""
