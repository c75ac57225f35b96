"""What all that reports shares: tables, figures with their words, and files of results."""
