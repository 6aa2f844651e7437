"""From a trained encoder to a table of embeddings, or to files that embed songs elsewhere."""
