"""Weight packs: what they are, how they are fetched, checked and read."""
