"""Keeping a store whole: verify, repair, and the removal of what nobody needs."""
