"""What a process needs whatever it does: its command line, its ranks, its end, whole files."""
