"""One mount served by several processes: whose turn it is, and what they have to tell one another."""
