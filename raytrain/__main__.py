"""The `raytrain` command, also as `python -m raytrain`: signals are handled before its imports."""

from raytrain.core.signals import handled


def main() -> None:
    """The entry point."""
    with handled():
        from raytrain.cli.app import main as command

        command()


if __name__ == "__main__":
    main()
