"""Before anything starts: what a run takes, how fast it will be, whether there is room."""
