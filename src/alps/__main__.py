"""`python -m alps` and the `alps` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from alps.cli.main import run

    run()


if __name__ == "__main__":
    main()
