"""Turns finished trials into tables, pictures and pages. Imports no torch and runs none of the code that made the results."""
