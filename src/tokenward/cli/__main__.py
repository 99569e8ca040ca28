"""``python -m tokenward.cli``."""

from tokenward.cli import main

if __name__ == "__main__":
    main()
