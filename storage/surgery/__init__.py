"""Stores made of stores, without the teacher: fewer ids, another layout, a merge, a subset."""
