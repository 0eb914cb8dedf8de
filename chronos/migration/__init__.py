"""The migration: one file for each thing it does; ``run`` has their order."""
