"""What makes parts of the documents."""
