"""What every part did, and when."""
