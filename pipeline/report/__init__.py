"""The report: one self-contained page about runs, or about a store.

Enters: run folders, or a store. Leaves: an HTML file that asks for nothing else. Costs: the store's rows once (at most
120,000 of them), one pass of each student over what the page shows of the held-out text, 1.3 MB of plotting library.

    data        a run's folder as plain numbers; spent: what its stages took
    store_data  a store's rows as plain numbers
    teacher     what the teacher says at stored rows: entropy, mass, likeliest ids
    documents   the text that the page shows token by token, with the teacher's rows and the students'
    student     a student's rows on that text, in a process of its own
    plots       figures; picture: the pipeline; page: the whole page; command: the command line's side
"""
