"""What is thought of responses: scores (of one response), checks against a reference, a user's own function, and the
verdict made of them: kept or dropped, and why.
"""
