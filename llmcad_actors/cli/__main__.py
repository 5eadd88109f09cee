"""`python -m llmcad_actors.cli`: the same as `llmcad`."""

from llmcad_actors.cli.command import main

main()
