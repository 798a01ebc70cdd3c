"""What a run will need, before there is a GPU: memory, work, traffic and time, on the real code."""
