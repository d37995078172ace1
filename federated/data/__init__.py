"""The data sets, their partitions over clients, and the files that ship with the project."""
