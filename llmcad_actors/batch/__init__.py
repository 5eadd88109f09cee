"""Many prompts from a file, to a file."""
