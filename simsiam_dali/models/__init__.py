"""Encoders and losses; nothing here knows where a batch comes from."""
