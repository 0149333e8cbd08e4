"""The running service: what sends to us, what we fetch, and what may be asked. `serve` starts it."""
