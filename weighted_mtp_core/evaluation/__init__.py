"""Stage 3, and finished runs opened again."""
