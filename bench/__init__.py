"""What the migration costs, measured: speed, WAL, and how long a live application has to wait."""
