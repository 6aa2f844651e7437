"""From shards to batches: the shard format, the augmentations, the DALI graph and its torch iterator."""
