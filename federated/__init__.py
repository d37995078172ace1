"""What the command-line scripts share. Imports point downwards only, and torch is imported no sooner than it is needed."""
