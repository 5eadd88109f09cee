"""Products and attention around weights as they are stored: in C where it was built, else by torch."""
