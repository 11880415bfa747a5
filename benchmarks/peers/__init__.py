"""What runs in the peer's own environment (`make bench-peers`). Imports nothing of ray."""
