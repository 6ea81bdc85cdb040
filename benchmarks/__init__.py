"""What this server's speed is measured with; `make bench` runs `python -m benchmarks`."""
