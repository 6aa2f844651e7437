"""A local page to listen to the library: songs, audio, ratings and playlists over HTTP."""
