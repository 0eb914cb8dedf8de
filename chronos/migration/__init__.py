"""The migration: one file for each thing it does. ``run`` is the order in which they are done."""
