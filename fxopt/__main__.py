"""`python -m fxopt`: the same as the command `fxopt`."""

from fxopt.cli import main

if __name__ == "__main__":
    main()
