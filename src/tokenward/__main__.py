"""``python -m tokenward``."""

from tokenward.cli import main

if __name__ == "__main__":
    main()
