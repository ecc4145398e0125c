"""How faithful a store is: the positions kept in full, what is measured on them, and what a recipe may ask."""
