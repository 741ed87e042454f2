"""`python -m flatcal_dist.cli` does what `flatcal` does."""

from flatcal_dist.cli.main import main

if __name__ == "__main__":
    main()
