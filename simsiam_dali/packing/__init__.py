"""From a music folder to shards: find songs, decode and cut each, read tags and ratings, split, shuffle, write.

`pack.pack` runs all steps; each other module is one of them. `decode.decode` decodes any single file.
"""
