"""`python -m latentdiff`: the command line."""

from latentdiff.cli import main

if __name__ == "__main__":
    main()
