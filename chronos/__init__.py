"""chronos: webhook deliveries logged into daily PostgreSQL partitions, in place and on a live database."""

__version__ = "0.1.0"
