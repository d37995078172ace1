"""From finished trials to tables, pictures and pages. It imports no torch and runs none of the code that made the results."""
