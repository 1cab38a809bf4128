"""The click commands; the only place that prints."""


def main() -> None:
    """Entry point."""
