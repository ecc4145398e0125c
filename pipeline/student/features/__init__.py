"""What a student learns from inside its teacher: hidden states, attention maps, embeddings, relations between tokens.

    config ─► maps ─► losses of a step: hidden, attention, relations
                          ▲
                       capture (hooks on the student's blocks)

Enters: a recipe's `features`, what the store keeps of the teacher's layers, the student while its forward runs. Leaves:
sums over the trained positions. Costs: importing this package costs nothing; `config` and `maps` need no torch.
"""
