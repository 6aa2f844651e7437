"""The search for better settings: what is searched, a trial, the study that processes share, and what is told of it."""
