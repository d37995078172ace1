"""The data sets, how they are split over clients, and the files that ship with the project."""
