"""How the server is run, and what that comes to: `python -m deploy.simulate`."""
