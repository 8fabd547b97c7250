"""`python -m bench`: what `prelay bench` and `prelay profile` run."""

from bench.cli import main

if __name__ == "__main__":
    main()
