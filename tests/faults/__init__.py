"""Kill it at any point, come back, and count the rows."""
