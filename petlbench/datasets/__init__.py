"""Data sets: each source yields rows in the schema of a task."""
