"""What PostgreSQL's catalogs say about a table, and the statements that recreate it."""
