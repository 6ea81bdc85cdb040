"""`make soak`: an hour's mischief in twenty minutes, and nothing wrong, lost or left behind."""
