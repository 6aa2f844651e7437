"""Recommendations from embeddings and ratings."""
