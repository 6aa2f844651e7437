"""Pack a folder of songs into shards: `python tools/make_shards.py music/`, which is `simsiam-dali pack music/`."""

from simsiam_dali.pack import main

if __name__ == "__main__":
    main()
