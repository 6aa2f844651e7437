"""From a music folder to shards: find songs, decode and cut each, read tags and ratings, split, shuffle, write.

`pack.pack` is the whole of it; each other module is one step. `songs.SongAudio` decodes any single file.
"""
