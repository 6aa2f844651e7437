"""Hyperparameter search: the space, one trial, the study that processes share, the loop over trials, the report."""
