"""Data sources: one file each, every one yielding rows of a task's schema."""
