"""Recipes with stages: each is a run of its own, and its student the teacher of a later one.

run      one stage after the other, each resumed wherever it stopped; then the table of all students
compare  every student against the teacher with which its chain began
dry_run  what a run would do, and why
redo     what was made by other settings is put aside, never removed
"""
