"""What this machine has, and what is known of it: memory, processor, figures, folders of runs."""
