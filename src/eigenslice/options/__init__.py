"""Options of every verb: one validated model a file."""
