"""The comparison: runs of algorithms on tasks, from the same supervised policy."""
