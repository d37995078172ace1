"""What a trial computes: local training, evaluation and the record of both. It knows no process and no socket."""
