"""Taking neurons out of a model: for a while, once, or for as long as it trains."""
