"""From flags and run.yaml to checked values: arguments, model, sampler, layout of ranks."""
