"""`python -m eigenslice`."""

from eigenslice.cli import main

if __name__ == "__main__":
    main()
