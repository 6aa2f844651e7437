"""Self-supervised embeddings of a music library: WebDataset shards, a DALI data graph, SimSiam training."""
