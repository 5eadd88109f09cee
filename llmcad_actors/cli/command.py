"""Entry point of `llmcad`: ready for signals before the rest is loaded, which takes a second."""

import sys

from llmcad_actors.cli.interruption import exit_code, interruptible, leave_if_interrupted, told_by


def main() -> None:
    """Run the command that the arguments name; ends the process."""
    try:
        with interruptible():
            from llmcad_actors.cli.commands import app

            app()
    except KeyboardInterrupt:
        print(f"llmcad: {told_by()}", file=sys.stderr)
        leave_if_interrupted()
        sys.exit(exit_code())
    except SystemExit:
        leave_if_interrupted()
        raise
