"""The programs of `pose-megatron`, a file each; `__main__` chooses one."""
