"""What callers hold: the options of a request, and the request under way. No Ray."""
