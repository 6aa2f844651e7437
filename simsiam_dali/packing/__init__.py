"""From a music folder to shards: `pack.pack` runs all steps, and each other module is one of them."""
