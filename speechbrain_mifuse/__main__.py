"""`python -m speechbrain_mifuse` is the console script `speechbrain-mifuse`."""

from speechbrain_mifuse.cli.main import main

if __name__ == "__main__":
    main()
