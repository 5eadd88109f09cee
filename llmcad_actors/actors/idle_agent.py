"""Stands in for an agent of Ray that has nothing to do here: 5 MB instead of 55. A script, run by itself.

The raylet starts two agents, waits for the numbers of their ports, and ends when one of them does. On one machine and
without runtime environments nobody ever calls them. So this one writes the files, says that nobody listens, and lives
until the raylet closes the pipe that is its standard input. A file appears with its number in it, never empty: the
raylet ends at once when it reads an empty one. Imports only what the interpreter holds anyhow.
"""

import os
import sys

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
NOBODY = "-1"


def port_files(arguments: list[str]) -> list[str]:
    """Paths of the files in which the raylet looks for the ports, from the agent's own arguments."""
    options = dict(
        argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument
    )
    return [f"{options['session-dir']}/{port}_{options['node-id']}" for port in PORTS]


def write_whole(path: str, text: str) -> None:
    """Write a file that nobody sees half written."""
    unfinished = f"{path}.{os.getpid()}"
    with open(unfinished, "w") as file:
        file.write(text)
    os.replace(unfinished, path)


if __name__ == "__main__":
    for path in port_files(sys.argv[1:]):
        write_whole(path, NOBODY)
    sys.stdin.read()
