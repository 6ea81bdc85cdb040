"""`make soak`: mixed clients, models that come and go, and faults, for twenty minutes."""
