"""MLflow: the client, the run of a training, a finished run, the runs of an experiment."""
