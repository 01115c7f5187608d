"""``python -m postlude`` is the command ``postlude``."""

from postlude.cli import main

if __name__ == "__main__":
    main()
