"""What PostgreSQL says of a table, and the statements that say it again."""
