"""From a trained encoder to a table of vectors."""
