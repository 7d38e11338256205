"""`python -m sparsemae` is the `sparsemae` command."""

from sparsemae.cli import main

if __name__ == "__main__":
    main()
