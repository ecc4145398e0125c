"""Questions about stores: what is there, what it says, whom it served; and the same for SQL."""
