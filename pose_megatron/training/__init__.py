"""Training on megatron-core: what a run is made of, its trainer, a step, the loop, checkpoints.

Start with run.py, then trainer.py, step.py and train.py.
"""
