"""A demonstration on servers of its own: nothing is installed, and nothing is left behind."""
