"""The `llmcad` command: options, what is printed, the terminal."""
