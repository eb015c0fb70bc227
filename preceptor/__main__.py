"""`python -m preceptor` is the command `preceptor`."""

from preceptor.app.cli import main

if __name__ == "__main__":
    main()
