"""`python -m simsiam_dali COMMAND ...` is the console command `simsiam-dali COMMAND ...`."""

from simsiam_dali.cli import main

if __name__ == "__main__":
    main()
