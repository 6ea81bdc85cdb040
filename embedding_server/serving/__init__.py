"""What is served: admission, batching, residency."""
