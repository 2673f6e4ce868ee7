"""Run the command line with ``python -m embedsurgery``."""

from embedsurgery.cli.main import main

if __name__ == "__main__":
    main()
