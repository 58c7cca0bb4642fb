"""The ranks: how they meet, the pool that is global, and the tokens that travel."""
